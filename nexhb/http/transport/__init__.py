"""HTTP below the handlers: connections, request heads and bodies, TLS, problem details."""
