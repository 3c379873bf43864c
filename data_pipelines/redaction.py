"""Takes secrets out of text before anybody sees or stores it: errors, lines on the screen, lists in a run's folder."""

from __future__ import annotations

import os
import re

_HIDDEN = "..."
_SCHEME = r"[A-Za-z][\w+.-]*:/{1,2}"  # a Path makes one slash of two
_PATTERNS = (
    # user:password@ of a URL, with or without its scheme
    (re.compile(rf"({_SCHEME}|//)[^/\s'\"<>]*@"), r"\1"),
    # a URL's query, of which any part may be a signature
    (re.compile(rf"({_SCHEME}[^\s'\"<>?]*\?)[^\s'\"<>)]*[^\s'\"<>).,:;]"), rf"\1{_HIDDEN}"),
    # what signs a request, wherever it stands: errors of clients cut URLs to pieces
    (
        re.compile(
            r"\b(X-(?:Amz|Goog|Ms)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|access_token|token)"
            r"(=|%3D)[^\s&'\"<>)]+",
            re.IGNORECASE,
        ),
        rf"\1\2{_HIDDEN}",
    ),
    # headers
    (
        re.compile(
            r"((?:Proxy-)?Authorization|Cookie|X-Amz-Security-Token)(['\"]?\s*[:=]\s*['\"]?)"
            r"(?:(?:Basic|Bearer|AWS4-HMAC-SHA256)\s+)?[^\s'\"]+",
            re.IGNORECASE,
        ),
        rf"\1\2{_HIDDEN}",
    ),
    # options of clients, in Python, JSON or YAML
    (
        re.compile(
            r"(\w*(?:secret|password|passwd|(?:access|auth|session|security|refresh|sas)_token|api_key|access_key|account_key|connection_string)\w*)"
            r"(['\"]?\s*[:=]\s*['\"]?)[^\s,'\"}]+",
            re.IGNORECASE,
        ),
        rf"\1\2{_HIDDEN}",
    ),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), rf"\1{_HIDDEN}"),  # ids of AWS keys
)
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?|KEY|KEY_ID)$|SECRET", re.IGNORECASE)
_LEAST_LENGTH = 8  # of a secret in the environment; a shorter word may stand anywhere


def redacted(text: str) -> str:
    """The text without passwords, signatures and keys, and without what secret variables of the environment hold."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_LENGTH and value in text and _SECRET_NAME.search(name) and value[0] not in "/~":
            text = text.replace(value, f"${name}")
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text
