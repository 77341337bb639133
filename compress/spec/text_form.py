"""Text form: base of values that recipes and flags write as text."""

from __future__ import annotations

from typing import Any, Self

from compress.errors import UsageError


class TextForm:
    """Base of types that `parse` reads and `str` prints; pydantic fields accept their text, and report what was expected."""

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Reads the text form. Raises UsageError."""
        raise TypeError(f"{cls.__name__} has no text form")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def read(text: Any) -> Any:
            try:
                return cls.parse(text)
            except UsageError as error:
                raise ValueError(error.problems[0].expected) from None

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )
