"""The checks of `nexhb doctor`, each with a remedy in case it fails."""
