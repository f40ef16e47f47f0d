"""The forms of access tokens and keys, as regular expressions: for what is blotted out of messages, scrubbed
from a text, and kept from leaving with a push."""

HUB = r"(?<!\w)hf_[A-Za-z0-9]{20,}"
GITHUB_FINE_GRAINED = r"(?<!\w)github_pat_[A-Za-z0-9_]{22,}"
GOOGLE = r"(?<!\w)AIza[A-Za-z0-9_-]{35}"
BEGIN_OF_PRIVATE_KEY = r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
END_OF_PRIVATE_KEY = BEGIN_OF_PRIVATE_KEY.replace("BEGIN", "END")
