"""Which versions of packages a result was made with."""

from importlib import metadata


def version_of(package: str) -> str:
    """Return the version of an installed package, or "absent": this one runs from a checkout, too, in which nothing is installed.

    >>> version_of("no-such-package")
    'absent'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
