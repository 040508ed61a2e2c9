"""The package version, in one place for `setup.cfg`, saved agents and data sets."""

__version__ = "0.1.0"
