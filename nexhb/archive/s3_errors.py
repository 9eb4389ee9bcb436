"""What S3-compatible stores and the way to them answer instead of doing what was asked: one StoreError each."""

from __future__ import annotations

from botocore import exceptions as boto
from botocore.exceptions import ClientError

from nexhb.errors import ObjectMissing, StoreError

LONGEST = 300  # characters of the store's own message that are repeated

_CREDENTIALS = "Check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile of ~/.aws, or the role."
_RENEW = "Renew the credentials; a role's are renewed by themselves."
_ROOM = "Make room in the store, or have its quota raised."
_HINTS = {
    "AccessDenied": "The credentials need s3:PutObject, s3:GetObject and, to hear what is missing, s3:ListBucket.",
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "NoSuchBucket": "Make the bucket, or correct archive.url.",
    "PermanentRedirect": "Correct archive.region.",
    "AuthorizationHeaderMalformed": "Correct archive.region.",
    "QuotaExceeded": _ROOM,
    "BadDigest": "The file was changed on its way, or is not what it was when it was hashed.",
}

# Answered as 400, and no other headers would change it: the bytes, the name, the credentials or the clock are wrong.
_NO_HEADERS_FAULT = {
    "AuthorizationHeaderMalformed", "BadDigest", "EntityTooLarge", "EntityTooSmall", "ExpiredToken",
    "ExpiredTokenException", "IncompleteBody", "InvalidAccessKeyId", "InvalidBucketName", "InvalidToken",
    "KeyTooLongError", "RequestTimeTooSkewed", "RequestTimeout", "TokenRefreshRequired", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def status(error: ClientError) -> int:
    """The HTTP status of a store's answer; 0 where it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def retried(error: ClientError) -> bool:
    """Whether an attempt came before the one that was answered so."""
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0


def exists(error: ClientError) -> bool:
    """Whether a put with IfNoneMatch was refused because there is an object, or one is just being put."""
    return status(error) == 412 or _code(error) == "ConditionalRequestConflict"


def header_unknown(error: ClientError) -> bool:
    """Whether the store may have refused a put for a header that it does not know, and not for anything else.

    Stores say so by 400 or 501 with codes of their own choosing (InvalidArgument, NotImplemented, none at all), so
    every code counts but those that mean something else.
    """
    return status(error) == 501 or (status(error) == 400 and _code(error) not in _NO_HEADERS_FAULT)


def store_error(what: str, endpoint: str, error: Exception) -> StoreError:
    """`error` in one sentence: what was asked, of whom, and what came instead. No secret stands in it."""
    if isinstance(error, ClientError):
        return _answered(what, endpoint, error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        # What a provider says may hold anything: it is not repeated.
        return StoreError(f"{what}: no credentials were found ({type(error).__name__}).", hint=_CREDENTIALS)
    if isinstance(error, boto.ReadTimeoutError):
        return StoreError(f"{what}: the store at {endpoint} did not answer in time.")
    if isinstance(error, boto.ConnectionError):
        reason = _short(str(getattr(error, "kwargs", {}).get("error") or error))
        return StoreError(
            f"{what}: the store at {endpoint} cannot be reached: {reason}.", hint="See archive.endpoint_url."
        )
    return StoreError(f"{what}: {_short(str(error)) or type(error).__name__}.")


def _answered(what: str, endpoint: str, error: ClientError) -> StoreError:
    code = _code(error)
    if status(error) == 404 and code in {"NoSuchKey", "NotFound", "404"}:
        return ObjectMissing(f"{what}: there is none.")
    message = _short(str(error.response.get("Error", {}).get("Message") or ""))
    said = f"{code} ({status(error)})" + (f": {message}" if message else "")
    hint = _ROOM if status(error) == 507 else _HINTS.get(code, "")
    return StoreError(f"{what}: the store at {endpoint} answered {said}.", hint=hint)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST].rstrip(" .")
