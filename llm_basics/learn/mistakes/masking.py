"""Masks for personal data: email addresses, phone numbers, IPv4 addresses."""

import re

from llm_basics.learn import probes
from llm_basics.quality import masking

step = probes.Step("masking")
EMAIL, PHONE, IP = masking.EMAIL_MASK, masking.PHONE_MASK, masking.IP_MASK
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"


def masked(about, kind, cases, **ground):
    """What becomes of each text, with the number of masks before it."""

    def observe(a):
        if kind == "emails":
            return ["{1} in: {0}".format(*a.run_mask_emails(text)) for text in cases]
        if kind == "phones":
            return ["{1} in: {0}".format(*a.run_mask_phone_numbers(text)) for text in cases]
        return ["{1} in: {0}".format(*a.run_mask_ips(text)) for text in cases]

    step.value(about, observe, list(cases.values()), axes="text", **(ground or {"contract": f"mask_{kind}"}))


OTHERS = "the assignment's tests have plain addresses; pages of the web have these forms, too"
masked(
    "an address, and two of them",
    "emails",
    {
        "contact me at test@gmail.com if you can": f"1 in: contact me at {EMAIL} if you can",
        "ada.l@b.org and bob@c.com": f"2 in: {EMAIL} and {EMAIL}",
        "bob@c.com or bob@c.com": f"2 in: {EMAIL} or {EMAIL}",
    },
)
masked("a mask that the text has already", "emails", {f"{EMAIL} or bob@c.com": f"1 in: {EMAIL} or {EMAIL}"})
masked("a plus in the name", "emails", {"ada+news@b.org": f"1 in: {EMAIL}"}, beyond=OTHERS)
masked("a hyphen in the domain", "emails", {"ada@my-site.org": f"1 in: {EMAIL}"}, beyond=OTHERS)
masked("a domain of three labels", "emails", {"ada@b.co.uk,": f"1 in: {EMAIL},"}, beyond=OTHERS)
masked("a long last label", "emails", {"ada@b.museum": f"1 in: {EMAIL}"}, beyond=OTHERS)
masked("capital letters", "emails", {"ADA@B.ORG": f"1 in: {EMAIL}"}, beyond=OTHERS)
masked("a full stop behind an address", "emails", {"Ask bob@c.com.": f"1 in: Ask {EMAIL}."}, beyond=OTHERS)
masked(
    "no address",
    "emails",
    {text: f"0 in: {text}" for text in ("@ada wrote", "a@b", "5 @ 3.50 each", "me@localhost")},
    beyond=OTHERS,
)

FORMS = ("2831823829", "(283)-182-3829", "(283) 182-3829", "283-182-3829")
masked("four forms of a number", "phones", {f"call {n} now": f"1 in: call {PHONE} now" for n in FORMS})
masked("two numbers", "phones", {"283-182-3829, 2831823829": f"2 in: {PHONE}, {PHONE}"})
masked("dots in a number", "phones", {"283.182.3829": f"1 in: {PHONE}"}, beyond=OTHERS)
masked("a country code", "phones", {"+1 283-182-3829": f"1 in: {PHONE}"}, beyond=OTHERS)
masked("parentheses around a number", "phones", {"(2831823829)": f"1 in: ({PHONE})"}, beyond=OTHERS)
NUMBERS = "a mask over every long number destroys prices, tables and identifiers"
masked(
    "a longer row of digits", "phones", {"order 12345678901234": "0 in: order 12345678901234"}, beyond=NUMBERS
)
masked("decimals", "phones", {"pi is 3.1415926535": "0 in: pi is 3.1415926535"}, beyond=NUMBERS)
masked("seven digits", "phones", {"part 182-3829": "0 in: part 182-3829"}, beyond=NUMBERS)

masked(
    "an address, and three of them",
    "ips",
    {
        "ping 192.0.2.146 now": f"1 in: ping {IP} now",
        "8.8.8.8, 10.0.0.1 and 127.0.0.1": f"3 in: {IP}, {IP} and {IP}",
    },
)
masked("the numbers 250 to 255", "ips", {"255.250.251.0": f"1 in: {IP}"})
masked("numbers above 255", "ips", {"300.1.1.1": "0 in: 300.1.1.1"}, beyond=NUMBERS)
masked("five numbers", "ips", {"see 1.2.3.4.5": "0 in: see 1.2.3.4.5"}, beyond=NUMBERS)
masked("three numbers", "ips", {"torch 2.11.0": "0 in: torch 2.11.0"}, beyond=NUMBERS)
masked("numbers without dots", "ips", {"10 20 30 40": "0 in: 10 20 30 40"}, beyond=NUMBERS)
masked("a full stop behind it", "ips", {"It is 10.0.0.1.": f"1 in: It is {IP}."}, beyond=OTHERS)
masked("a port behind it", "ips", {"10.0.0.1:8080": f"1 in: {IP}:8080"}, beyond=OTHERS)


def by(pattern, mask, count=0, flags=re.IGNORECASE | re.ASCII):
    return lambda text: re.subn(pattern, mask, text, count=count, flags=flags)


def mistake(piece, wrong, name, text):
    wrong.__name__, wrong.__doc__ = name, text
    step.mistake(f"masking.{piece}", source="written for this catalogue")(wrong)


E, P, IPS = "mask_emails", "mask_phone_numbers", "mask_ips"
NAME, DOMAIN = r"[\w%+-][\w.%+-]*", r"(?:[a-z0-9-]+\.)+[a-z]{2,}"
mistake(
    E,
    lambda text: (masking.EMAIL.sub(EMAIL, text), len(set(masking.EMAIL.findall(text)))),
    "different addresses counted",
    "An address that occurs twice is counted once. The count is that of the "
    "masks that are set: use re.subn, or the length of the list of all matches.",
)
mistake(
    E,
    lambda text: (masking.EMAIL.sub(EMAIL, text), masking.EMAIL.sub(EMAIL, text).count(EMAIL)),
    "masks of the text counted",
    "Masks that were in the text already are counted. Count the replacements, "
    "which re.subn returns beside the text.",
)
mistake(
    E,
    by(f"{NAME}@{DOMAIN}", EMAIL, count=1),
    "one address masked",
    "Only the first address of a text is "
    "masked. Replace all matches: the argument count of re.sub is 0, and search finds just one.",
)
mistake(
    E,
    by(rf"[\w.-]+@{DOMAIN}", EMAIL),
    "plus forgotten",
    "A plus is not allowed in the name, so ada+ stays in "
    "the text in ada+news@b.org. The part before the @ has letters, digits and ._%+-.",
)
mistake(
    E,
    by(rf"[\w%+-]+@{DOMAIN}", EMAIL),
    "dots in the name forgotten",
    "The name stops at a dot: ada. stays in "
    "the text in ada.l@b.org, which is most of a person's name. Allow dots before the @.",
)
mistake(
    E,
    by(rf"{NAME}@(?:[a-z0-9]+\.)+[a-z]{{2,}}", EMAIL),
    "hyphen forgotten",
    "A hyphen is not allowed in the "
    "domain, so ada@my-site.org is not found. Labels of a domain have letters, digits and hyphens.",
)
mistake(
    E,
    by(rf"{NAME}@[a-z0-9-]+\.[a-z]{{2,}}", EMAIL),
    "two labels",
    "The domain ends after two labels, and .uk "
    "stays behind the mask in ada@b.co.uk. Repeat the label with its dot: (?:[a-z0-9-]+\\.)+.",
)
mistake(
    E,
    by(rf"{NAME}@(?:[a-z0-9-]+\.)+[a-z]{{2,3}}", EMAIL),
    "three letters at the end",
    "The last label has at "
    "most three letters, and the rest of .museum stays behind the mask. Allow any number from two.",
)
mistake(
    E,
    by(f"{NAME}@{DOMAIN}", EMAIL, flags=re.NOFLAG),
    "capitals forgotten",
    "Capital letters are not found "
    "in the domain, which is not case-sensitive. Use re.IGNORECASE, or both ranges.",
)
mistake(
    E,
    by(rf"{NAME}@[a-z0-9-]+\.[\w.-]+", EMAIL),
    "full stop in the address",
    "The full stop of the sentence "
    "is taken into the address. A domain ends with a label of letters, not with a dot.",
)
mistake(
    E,
    by(rf"{NAME}@[a-z0-9-]+(?:\.[a-z0-9-]+)*", EMAIL),
    "domain without a dot",
    "A domain needs no dot here, "
    "so a@b and me@localhost are masked. An address of the internet has two labels or more.",
)

START, END = r"(?<![A-Za-z0-9])(?<!\d[.-])", r"(?![A-Za-z0-9])(?![.-]\d)"
CODE, AREA, REST = r"(?:\+?1[-. ]?)?", r"(?:\(\d{3}\)[-. ]{0,2}|\d{3}[-. ]?)", r"\d{3}[-. ]?\d{4}"
mistake(
    P,
    by(START + CODE + r"\d{3}[-. ]?" + REST + END, PHONE),
    "parentheses forgotten",
    "The area code in "
    "parentheses is not found, as in (283) 182-3829. It is the usual way to write a number: allow it.",
)
mistake(
    P,
    by(START + CODE + r"(?:\(\d{3}\)[-. ]{1,2}|\d{3}[-. ])\d{3}[-. ]\d{4}" + END, PHONE),
    "separators needed",
    "Ten digits without anything between them are not found. Make each separator "
    "optional, and check the characters around the number instead.",
)
mistake(
    P,
    by(START + CODE + r"(?:\(\d{3}\)-?|\d{3}[-. ]?)" + REST + END, PHONE),
    "space after parentheses forgotten",
    "A space behind the closing parenthesis is not allowed, so (283) 182-3829 is not found. Allow a space, a "
    "hyphen, or nothing there.",
)
mistake(
    P,
    by(r"(?<![A-Za-z0-9])(?<!\d[.-])(?:\+?1[-. ]?)?\(?\d{3}\)?[-. ]{0,2}" + REST + END, PHONE),
    "one parenthesis",
    "Both parentheses are optional by themselves, so the opening one of (2831823829) is taken "
    "and the closing one stays. Write two alternatives: with both, or without.",
)
mistake(
    P,
    by(CODE + AREA + REST, PHONE),
    "part of a longer number",
    "Ten digits inside a longer row are masked, as "
    "in order 12345678901234. Look behind and ahead: (?<!\\d) and (?!\\d).",
)
mistake(
    P,
    by(r"(?<![A-Za-z0-9])" + CODE + AREA + REST + END, PHONE),
    "decimals taken",
    "The decimals of 3.1415926535 "
    "are masked. A digit with a dot before the number makes it a fraction: (?<!\\d[.-]).",
)
mistake(
    P,
    by(START + AREA + REST + END, PHONE),
    "country code left",
    "The country code stays before the mask. "
    "Allow +1 or 1 with a separator before the area code, so that the whole number goes.",
)
mistake(
    P,
    by(START + CODE.replace(".", "") + r"(?:\(\d{3}\)[- ]{0,2}|\d{3}[- ]?)\d{3}[- ]?\d{4}" + END, PHONE),
    "dots forgotten",
    "Dots between the parts are not found, as in 283.182.3829. They are as common as hyphens; "
    "a dot in a class needs no backslash.",
)
mistake(
    P,
    by(START + CODE + f"{AREA}?" + REST + END, PHONE),
    "area code optional",
    "Seven digits are masked, such as "
    "the part number 182-3829. Without an area code a number identifies no person.",
)
mistake(
    P,
    by(START + CODE + AREA + REST + END, PHONE, count=1),
    "one number masked",
    "Only the first number of a "
    "text is masked. Replace all matches: the argument count of re.sub is 0, and search finds just one.",
)
mistake(
    P,
    by(START + CODE + AREA + REST + END, "|||PHONE|||"),
    "another mask",
    "The mask is not |||PHONE_NUMBER|||. "
    "All masks of a data set must be the same, so that they are found and counted later.",
)

mistake(
    IPS,
    by(r"(?<![A-Za-z0-9])(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z0-9])(?!\.\d)", IP),
    "any three digits",
    "Numbers above 255 are masked, as in 300.1.1.1. A number of an address is one byte: write the ranges "
    "250-255, 200-249, 100-199 and 0-99 as alternatives.",
)
mistake(
    IPS,
    by(rf"(?<![A-Za-z0-9])(?<!\d\.){OCTET}(?:.{OCTET}){{3}}(?![A-Za-z0-9])(?!\.\d)", IP),
    "dot not escaped",
    "A dot without a backslash is any character, so 10 20 30 40 is masked. Write \\. for the dot itself.",
)
mistake(
    IPS,
    by(rf"(?<!\d){OCTET}(?:\.{OCTET}){{3}}(?!\d)", IP),
    "longer versions taken",
    "Four of the five numbers of "
    "1.2.3.4.5 are masked, which is a version or a section. Look for a dot with a digit before and behind.",
)
mistake(
    IPS,
    by(
        rf"(?<![A-Za-z0-9])(?<!\d\.){OCTET}(?:\.{OCTET}){{3}}(?![A-Za-z0-9])(?!\.\d)".replace(
            "25[0-5]", "25[0-4]"
        ),
        IP,
    ),
    "255 left out",
    "255 is not found, as in 255.250.251.0, which is the largest byte. The range of the "
    "last digit after 25 is [0-5].",
)
mistake(
    IPS,
    by(
        r"(?<!\d)(?<!\d\.)(?:[1-9]?\d|1\d\d|2[0-4]\d|25[0-5])"
        r"(?:\.(?:[1-9]?\d|1\d\d|2[0-4]\d|25[0-5])){3}(?!\.\d)",
        IP,
    ),
    "shortest number first",
    "The alternatives are tried in order, and with one or two digits first the last number is cut: "
    "6 stays of "
    "192.0.2.146. Put three digits first, and look ahead for a digit.",
)
mistake(
    IPS,
    by(
        r"(?<!\d)(?<!\d\.)(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]\d?)"
        r"(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]\d?)){3}(?!\d)(?!\.\d)",
        IP,
    ),
    "zero forgotten",
    "0 is not a number here, so 10.0.0.1 is not found. Make the first of two digits optional, not "
    "the second: "
    "[1-9]?\\d.",
)
mistake(
    IPS,
    by(rf"(?<![A-Za-z0-9])(?<!\d\.){OCTET}(?:\.{OCTET}){{3}}(?![A-Za-z0-9.])", IP),
    "no full stop behind",
    "An address at the end of a sentence is not found, since no dot may follow. Only a dot with a "
    "digit behind "
    "it makes the row longer: (?!\\.\\d).",
)
mistake(
    IPS,
    by(rf"(?<![A-Za-z0-9])(?<!\d\.){OCTET}(?:\.{OCTET}){{2,3}}(?![A-Za-z0-9])(?!\.\d)", IP),
    "three are enough",
    "Three numbers with dots are masked, such as the version 2.11.0. An address has four: the group with its "
    "dot is repeated exactly three times.",
)
mistake(
    IPS,
    by(rf"(?<![A-Za-z0-9])(?<!\d\.){OCTET}(?:\.{OCTET}){{3}}(?::\d+)?(?![A-Za-z0-9])(?!\.\d)", IP),
    "port taken",
    "The port after the address is masked, too. It identifies no person, and the text loses the "
    "service that "
    "it mentions: end at the fourth number.",
)
