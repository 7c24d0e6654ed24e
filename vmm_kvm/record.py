"""Records that cost little to define: for what every start defines, and makes once or never.

CPython defines a class that is derived from SimpleNamespace in a tenth of the time of a NamedTuple,
whose constructor it compiles, and makes an object of it in three times the time. mypy checks the
fields as a dataclass's, also that nobody sets one.
"""

TYPE_CHECKING = False  # importing typing costs more than a command that does without it
if TYPE_CHECKING:
    from typing import Self, dataclass_transform

    class _Namespace:
        """SimpleNamespace with no attributes but those of its subclass: mypy refuses others."""

        def __init__(self, **fields: object) -> None: ...

else:
    from types import SimpleNamespace as _Namespace

    def dataclass_transform(**_options: object) -> object:  # noqa: D103 - typing's
        return lambda kind: kind


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record(_Namespace):
    """Named values, given by keyword; a subclass annotates them, with defaults or without.

    A class derived from a subclass has its fields too.
    """

    def __init__(self, **fields: object) -> None:
        defaults = {
            name: vars(kind)[name]
            for kind in reversed(type(self).__mro__[: -len(Record.__mro__)])
            for name in kind.__annotations__
            if name in vars(kind)
        }
        super().__init__(**{**defaults, **fields})

    def but(self, **changes: object) -> "Self":
        """Return a record that differs from this one in some values."""
        return type(self)(**{**vars(self), **changes})
