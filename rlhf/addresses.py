"""Secrets in web addresses: sent to the server that they are for, and written nowhere.

A recipe names them by environment variables, `http://me:${PASSWORD}@host/get_reward?key=${KEY}`. One that stands there in
clear is replaced by three stars wherever an address is written or printed.
"""

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

HIDDEN = "***"
ADDRESS = re.compile(r"""https?://[^\s'"<>\\]*[^\s'"<>\\,;.)\]]""")  # without what ends a sentence or a list
VARIABLE = re.compile(r"\$\{(\w+)\}")
SECRET_NAMES = re.compile(r"pass|pwd|secret|token|key|auth|sig|cred|access", re.IGNORECASE)
PARTS = re.compile(r"(https?://)(?:([^/?#]*)@)?([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)


def hide_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text in which nothing secret of an address is left: name and password before the host, keys behind `?`.

    Args:
        secrets: values that go too, wherever they stand.

    >>> hide_secrets("asked http://me:pw@host:5000/get_reward?key=abc&model=a twice")
    'asked http://me:***@host:5000/get_reward?key=***&model=a twice'
    >>> hide_secrets("http://me:${PASSWORD}@host/?key=${KEY}")
    'http://me:${PASSWORD}@host/?key=${KEY}'
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return ADDRESS.sub(lambda match: _without_secrets(match[0]), text)


def _without_secrets(address: str) -> str:
    match = PARTS.fullmatch(address)
    assert match is not None, "every address has these parts"
    scheme, login, place, query, fragment = match.groups()
    if login is not None:
        name, colon, password = login.partition(":")
        login = f"{name}:{_hidden(password)}@" if colon else f"{_hidden(name)}@"
    if query is not None:
        fields = (field.partition("=") for field in query.split("&"))
        shown = (
            f"{name}{sign}{_hidden(value) if SECRET_NAMES.search(name) else value}" for name, sign, value in fields
        )
        query = f"?{'&'.join(shown)}"
    return f"{scheme}{login or ''}{place}{query or ''}{fragment or ''}"


def _hidden(value: str) -> str:
    """Return what is written of a secret: the name of its variable, or three stars."""
    return value if not value or VARIABLE.fullmatch(value) else HIDDEN


def secrets_in(address: str) -> list[str]:
    """Return the secrets of an address in clear, as they stand there and as a server may repeat them.

    >>> secrets_in("http://me:p%20w@host/?key=abc&model=a")
    ['p%20w', 'abc', 'p w']
    """
    match = PARTS.fullmatch(address)
    login, query = (match[2] or "", match[4] or "") if match is not None else ("", "")
    name, colon, password = login.partition(":")
    fields = (field.partition("=") for field in query.split("&"))
    values = [password if colon else name, *(value for name, _, value in fields if SECRET_NAMES.search(name))]
    return list(dict.fromkeys(value for value in (*values, *map(unquote, values)) if value))


def secret_problem(address: str) -> str | None:
    """Return what is wrong with the secrets that an address names or lacks, in a sentence, or None.

    >>> secret_problem("http://me:***@host")
    'http://me:***@host: a secret was left out when this was written; name an environment variable in its place, ${NAME}.'
    """
    empty = [name for name in VARIABLE.findall(address) if not os.environ.get(name)]
    if empty:
        return f"{address}: the environment variable {empty[0]} is empty; put the secret there."
    if HIDDEN in address:
        return f"{address}: a secret was left out when this was written; name an environment variable in its place, ${{NAME}}."
    return None


def spell_out(address: str) -> str:
    """Return an address with the values of its environment variables, which must be set."""
    return VARIABLE.sub(lambda match: os.environ[match[1]], address)
