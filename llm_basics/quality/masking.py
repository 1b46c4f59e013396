"""Masks for personal data: email addresses, phone numbers and IPv4 addresses.

Models reproduce training text, so personal identifiers are replaced by a fixed text before training. Only
forms that a regular expression can match are supported: names and postal addresses need a trained tagger, and
phone numbers outside the North American plan have no common form.

The forms are those of Dolma's rules (arXiv 2402.00159, section 5.3.3).
"""

import re

EMAIL_MASK, PHONE_MASK, IP_MASK = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"

# at most 64 characters before the @ (RFC 5321), 63 between two dots (RFC 1035): limits keep the search linear
EMAIL = re.compile(
    r"(?<![a-z0-9_%+-])[a-z0-9_%+-][a-z0-9_.%+-]{0,63}"
    r"@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}(?![a-z0-9])",
    re.IGNORECASE | re.ASCII,
)

# not within a word or a longer number, nor the decimals of a number
PHONE = re.compile(
    r"(?<![A-Za-z0-9])(?<!\d[.-])(?:\+?1[-. ]?)?(?:\(\d{3}\)[-. ]{0,2}|\d{3}[-. ]?)\d{3}[-. ]?\d{4}"
    r"(?![A-Za-z0-9])(?![.-]\d)",
    re.ASCII,
)

_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# a fifth number before or after makes it a version or a section number
IP = re.compile(rf"(?<![A-Za-z0-9])(?<!\d\.){_OCTET}(?:\.{_OCTET}){{3}}(?![A-Za-z0-9])(?!\.\d)", re.ASCII)


def mask_emails(text: str) -> tuple[str, int]:
    """The text with each email address replaced by `|||EMAIL_ADDRESS|||`, and their number.

    An address is NAME@DOMAIN: letters, digits and `._%+-`, then labels of letters, digits and hyphens with
    dots between them, the last one of letters. A full stop after it belongs to the sentence.

    >>> mask_emails("Write to ada.l+news@maths.example.org.")
    ('Write to |||EMAIL_ADDRESS|||.', 1)
    """
    return EMAIL.subn(EMAIL_MASK, text)


def mask_phone_numbers(text: str) -> tuple[str, int]:
    """The text with each phone number replaced by `|||PHONE_NUMBER|||`, and their number.

    A number has 3, 3 and 4 digits, with nothing, a hyphen, a dot or a space between them, parentheses around
    the first three or none, and +1 or 1 before them or not. Longer rows of digits are no phone numbers.

    >>> mask_phone_numbers("(283) 182-3829 or +1 283-182-3829, order 12345678901234")
    ('|||PHONE_NUMBER||| or |||PHONE_NUMBER|||, order 12345678901234', 2)
    """
    return PHONE.subn(PHONE_MASK, text)


def mask_ips(text: str) -> tuple[str, int]:
    """The text with each IPv4 address replaced by `|||IP_ADDRESS|||`, and their number.

    An address is four numbers from 0 to 255 without leading zeros and with dots between them.

    >>> mask_ips("192.0.2.146 is up, 300.1.1.1 is no address, 1.2.3.4.5 a version.")
    ('|||IP_ADDRESS||| is up, 300.1.1.1 is no address, 1.2.3.4.5 a version.', 1)
    """
    return IP.subn(IP_MASK, text)
