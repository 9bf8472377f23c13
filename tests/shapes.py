"""The run-time check of the annotations in phyla: shapes and types of whatever tests pass in and get back.

Numbers follow the numeric tower, as type checkers have it: where a float is annotated an int is welcome.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
