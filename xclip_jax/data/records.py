"""Reading of records that turns whatever is wrong with one of them into a `BadSample`."""

from xclip_jax.data.base import Record, Source
from xclip_jax.errors import BadSample, UserError


def read(source: Source, index: int) -> Record | BadSample:
    """Return record `index` of `source`, or the `BadSample` that says why it cannot be used.

    Raises:
      UserError, MemoryError: errors that concern more than this record.
    """
    try:
        return source[index]
    except Exception as error:
        return as_bad_sample(error)


def as_bad_sample(error: Exception) -> BadSample:
    """Return what reading or decoding one record raised as a `BadSample` with the exception's type as its reason.

    Parsers, decoders and tokenizers raise exceptions of any class on input that they were not made for.

    Raises:
      UserError, MemoryError: `error` itself, where it concerns more than the record.
    """
    if isinstance(error, BadSample):
        return error
    if isinstance(error, (UserError, MemoryError)):
        raise error
    return BadSample(type(error).__name__, str(error))
