"""Every private or young name of a host library that the package uses, and the versions it was tested with.

Other modules import such names from here. A name that a host's version lacks costs the feature that needs it, with an
error that names the host, the version found and the versions that work; it never costs the import of this package.
"""
