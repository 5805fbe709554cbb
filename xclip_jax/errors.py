"""The one exception that is the user's to mend; commands print it as a sentence, without a traceback."""


class UserError(ValueError):
    """Bad input. The message names the file, key or value that is wrong and what to do about it."""


def one_of(key: str, value: object, valid: object) -> None:
    """Raises `UserError` unless `value` is among `valid`; the message lists the valid values of config key `key`."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, valid))}.")
