"""Parsers as yacc(1) makes them, for comparison with the hand-written one of vm.conf.

`Automaton` is an LALR(1) automaton of a grammar; `errors` runs it as yacc's parsers run: a state
with only one reduction reduces without looking ahead, and after a syntax error the symbol `error`
stands for all discarded tokens, until three tokens have been shifted.

Source: POSIX yacc, "Error Handling".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

END = "END"
_ERROR = "error"
_SHIFTS = 3


class Rule(NamedTuple):
    """`name` may consist of these symbols, one after the other."""

    name: str
    symbols: tuple[str, ...]


class Item(NamedTuple):
    """Rule number `rule`, of which `dot` symbols have been seen, before the token `ahead`."""

    rule: int
    dot: int
    ahead: str


# No tuples: a shift to state 5 would equal a reduction by rule 5.
@dataclass(frozen=True, slots=True)
class Shift:
    """Take the token, and go to a state."""

    state: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Replace the symbols of a rule by its name."""

    rule: int


class ConflictError(Exception):
    """The grammar is not LALR(1)."""


class Automaton:
    """The automaton of a grammar: each name and its alternatives, the first name being all."""

    def __init__(self, grammar: Mapping[str, Sequence[str]]) -> None:
        self._rules = [Rule("", (next(iter(grammar)),))]
        self._rules += [
            Rule(name, tuple(each.split())) for name in grammar for each in grammar[name]
        ]
        self._by_name: dict[str, list[int]] = {}
        for number, rule in enumerate(self._rules):
            self._by_name.setdefault(rule.name, []).append(number)
        self._nullable: set[str] = set()
        self._first: dict[str, set[str]] = {name: set() for name in self._by_name}
        self._find_first()
        self._states: list[set[Item]] = []
        self._goto: dict[tuple[int, str], int] = {}
        self._find_states()
        self._actions = [self._actions_of(state) for state in range(len(self._states))]
        self._defaults = [self._default_of(actions) for actions in self._actions]

    def errors(self, next_token: Callable[[], str], report: Callable[[], None]) -> None:
        """Parse; calls `report` for each syntax error that yacc's parser would report."""
        stack, to_shift, ahead = [0], 0, None
        while True:
            action: Shift | Reduce | None = self._defaults[stack[-1]]
            if action is None:
                ahead = next_token() if ahead is None else ahead
                action = self._actions[stack[-1]].get(ahead)
            match action:
                case Shift(state):
                    stack.append(state)
                    ahead = None
                    to_shift = max(to_shift - 1, 0)
                case Reduce(0):
                    return
                case Reduce(number):
                    rule = self._rules[number]
                    del stack[len(stack) - len(rule.symbols) :]
                    stack.append(self._goto[stack[-1], rule.name])
                case None if to_shift == _SHIFTS:
                    if ahead == END:
                        return
                    ahead = None
                case None:
                    if not to_shift:
                        report()
                    to_shift = _SHIFTS
                    while (stack[-1], _ERROR) not in self._goto:
                        stack.pop()
                    stack.append(self._goto[stack[-1], _ERROR])

    def _find_first(self) -> None:
        """Find the tokens that each name may begin with, and whether it may be empty."""
        before = -1
        while before != (before := sum(map(len, self._first.values())) + len(self._nullable)):
            for rule in self._rules:
                found, is_nullable = self._beginning(rule.symbols)
                self._first[rule.name] |= found
                if is_nullable:
                    self._nullable.add(rule.name)

    def _beginning(self, symbols: Sequence[str]) -> tuple[set[str], bool]:
        found: set[str] = set()
        for symbol in symbols:
            found |= self._first.get(symbol, {symbol})
            if symbol not in self._nullable:
                return found, False
        return found, True

    def _closure(self, items: set[Item]) -> set[Item]:
        found, work = set(items), list(items)
        while work:
            item = work.pop()
            rest = self._rules[item.rule].symbols[item.dot :]
            if not rest or rest[0] not in self._by_name:
                continue
            tokens, is_nullable = self._beginning(rest[1:])
            for ahead in tokens | ({item.ahead} if is_nullable else set()):
                for rule in self._by_name[rest[0]]:
                    new = Item(rule, 0, ahead)
                    if new not in found:
                        found.add(new)
                        work.append(new)
        return found

    def _find_states(self) -> None:
        """Find all states; those that differ only in their look-ahead are one (LALR)."""
        self._states.append(self._closure({Item(0, 0, END)}))
        numbers = {_core(self._states[0]): 0}
        work = [0]
        while work:
            state = work.pop()
            moves: dict[str, set[Item]] = {}
            for item in self._closure(self._states[state]):
                for symbol in self._rules[item.rule].symbols[item.dot : item.dot + 1]:
                    moves.setdefault(symbol, set()).add(item._replace(dot=item.dot + 1))
            for symbol, kernel in moves.items():
                items = self._closure(kernel)
                other = numbers.setdefault(_core(items), len(self._states))
                if other == len(self._states):
                    self._states.append(set())
                if not items <= self._states[other]:
                    self._states[other] |= items
                    work.append(other)
                self._goto[state, symbol] = other

    def _actions_of(self, state: int) -> dict[str, Shift | Reduce]:
        found: dict[str, Shift | Reduce] = {}
        for item in self._states[state]:
            symbols = self._rules[item.rule].symbols
            action: Shift | Reduce
            if item.dot == len(symbols):
                symbol, action = item.ahead, Reduce(item.rule)
            elif symbols[item.dot] in self._by_name:
                continue
            else:
                symbol = symbols[item.dot]
                action = Shift(self._goto[state, symbol])
            if found.setdefault(symbol, action) != action:
                raise ConflictError(f"{self._rules[item.rule]} at {symbol}")
        return found

    @staticmethod
    def _default_of(actions: Mapping[str, Shift | Reduce]) -> Reduce | None:
        kinds = set(actions.values())
        only = kinds.pop()
        return only if not kinds and isinstance(only, Reduce) and only.rule else None


def _core(items: set[Item]) -> frozenset[tuple[int, int]]:
    return frozenset((item.rule, item.dot) for item in items)
