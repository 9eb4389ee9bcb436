"""Translate errors of S3-compatible stores and of the connection to them into StoreError."""

from __future__ import annotations

from botocore import exceptions as boto
from botocore.exceptions import ClientError

from nexhb.errors import ObjectMissing, StoreError

MAX_MESSAGE_CHARS = 300  # length at which the store's message is cut when it is quoted

_CREDENTIALS = "Check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile of ~/.aws, or the role."
_RENEW = "Renew the credentials; those of a role are renewed automatically."
_ROOM = "Free space in the store, or raise its quota."
_HINTS = {
    "AccessDenied": "The credentials need s3:PutObject, s3:GetObject and, to report missing objects, s3:ListBucket.",
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "NoSuchBucket": "Create the bucket, or correct archive.url.",
    "PermanentRedirect": "Correct archive.region.",
    "AuthorizationHeaderMalformed": "Correct archive.region.",
    "QuotaExceeded": _ROOM,
    "BadDigest": "The file changed in transit, or since it was hashed.",
}

# Error codes of 400 responses that have another cause than an unsupported header; a retry without headers cannot help:
# the bytes, the name, the credentials or the clock are wrong.
_UNRELATED_TO_HEADERS = {
    "AuthorizationHeaderMalformed", "BadDigest", "EntityTooLarge", "EntityTooSmall", "ExpiredToken",
    "ExpiredTokenException", "IncompleteBody", "InvalidAccessKeyId", "InvalidBucketName", "InvalidToken",
    "KeyTooLongError", "RequestTimeTooSkewed", "RequestTimeout", "TokenRefreshRequired", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def status(error: ClientError) -> int:
    """Return the HTTP status of the store's response; 0 if the response has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(error: ClientError) -> bool:
    """Return whether the error comes from a retry, not from the first attempt."""
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0


def is_precondition_failure(error: ClientError) -> bool:
    """Return whether a put with If-None-Match failed because the object exists or is being put concurrently."""
    return status(error) == 412 or _code(error) == "ConditionalRequestConflict"


def is_header_unsupported(error: ClientError) -> bool:
    """Return whether the store may have rejected a put because of a header that it does not support.

    Stores respond to such a header with 400 or 501 and various codes (InvalidArgument, NotImplemented, no code at all).
    So every code counts, except the codes that are known to have another cause.
    """
    return status(error) == 501 or (status(error) == 400 and _code(error) not in _UNRELATED_TO_HEADERS)


def store_error(operation: str, endpoint: str, error: Exception) -> StoreError:
    """Describe `error` in one sentence: the request, the endpoint and the failure. The sentence contains no secret."""
    if isinstance(error, ClientError):
        return _response_error(operation, endpoint, error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        # The message of a credential provider may contain a secret, so it is not quoted.
        return StoreError(f"{operation}: no credentials were found ({type(error).__name__}).", hint=_CREDENTIALS)
    if isinstance(error, boto.ReadTimeoutError):
        return StoreError(f"{operation}: the store at {endpoint} did not respond in time.")
    if isinstance(error, boto.ConnectionError):
        reason = _short(str(getattr(error, "kwargs", {}).get("error") or error))
        return StoreError(
            f"{operation}: the store at {endpoint} cannot be reached: {reason}.", hint="See archive.endpoint_url."
        )
    return StoreError(f"{operation}: {_short(str(error)) or type(error).__name__}.")


def _response_error(operation: str, endpoint: str, error: ClientError) -> StoreError:
    code = _code(error)
    if status(error) == 404 and code in {"NoSuchKey", "NotFound", "404"}:
        return ObjectMissing(f"{operation}: no such object.")
    message = _short(str(error.response.get("Error", {}).get("Message") or ""))
    summary = f"{code} ({status(error)})" + (f": {message}" if message else "")
    hint = _ROOM if status(error) == 507 else _HINTS.get(code, "")
    return StoreError(f"{operation}: the store at {endpoint} responded with {summary}.", hint=hint)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE_CHARS].rstrip(" .")
