"""The parser of vm.conf: a file, and those that it includes, to a Config.

Rules: statements here, switches and interfaces in `interfaces`, VMs in `vms`; each has its part of
the grammar in its docstring.

    file = { [ include | macro | global | switch | vm ] NL }

Source: vm.conf(5); section 4 of OpenBSD's behaviour.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmd.config.grammar import StatementError, Tokens
from vmd.config.host import Host, SystemHost
from vmd.config.interfaces import SwitchRule
from vmd.config.lexer import Kind, Macros
from vmd.config.model import (
    AGENTX_PATH,
    PATH_BYTES_MAX,
    Agentx,
    Config,
    GuestClock,
    Staggered,
    SwitchConfig,
    VmConfig,
)
from vmd.config.sizes import SizeError, scan_scaled
from vmd.config.values import byte_length, prefix4_of, prefix6_of
from vmd.config.vms import VmRule
from vmm_kvm.text import printable

OWN_WORDS = ("clock", "limit", "snapshots")
"""Words of ours that a statement can begin with."""
_AGENTX_CONTEXT_MAX = 32
_SOCKET_PATH_MAX = 107
# More is a file that includes itself.
_DEPTH_MAX = 16
_INCLUDES_MAX = 256
_PATTERN = re.compile(r"[*?[]")


class ConfigErrors(Exception):  # noqa: N818 - it is several
    """A vm.conf that cannot be used; `lines` are for the operator, `file:line: text` mostly."""

    def __init__(self, lines: tuple[str, ...], warnings: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.warnings = warnings


class Reading(NamedTuple):
    """The result of reading a vm.conf."""

    config: Config = Config()
    """Its contents, as far as they were understood."""
    errors: tuple[str, ...] = ()
    """Lines; if there are any, the file is not to be used."""
    notes: tuple[str, ...] = ()
    """Lines about the files themselves; the configuration is used nevertheless."""
    unused: tuple[str, ...] = ()
    """Names of macros that a file defines for nothing."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the operator."""
        return self.notes + tuple(f"warning: macro '{name}' not used" for name in self.unused)


def parse_config(
    path: str,
    macros: Mapping[str, str],
    *,
    is_optional: bool = False,
    skips_broken: bool = False,
    host: Host | None = None,
) -> Config:
    """Read a vm.conf.

    Unlike OpenBSD's vmd, only the default file may be absent: it is empty then. A named file that
    is missing is an error.

    Args:
        path: the file; relative paths, in it too, begin in the host's directory.
        macros: of the command line; no definition in a file changes them.
        is_optional: whether it is the default file, which need not be there.
        skips_broken: whether a VM that names a missing file is left out with a warning, instead of
            being an error.
        host: where files, users and groups are looked up; this host if None.

    Raises:
        ConfigErrors: the file cannot be read, or anything in it is wrong.
    """
    reading = read_config(
        path, macros, is_optional=is_optional, skips_broken=skips_broken, host=host
    )
    if reading.errors:
        raise ConfigErrors(reading.errors, reading.warnings)
    return reading.config._replace(warnings=reading.warnings)


def read_config(
    path: str,
    macros: Mapping[str, str],
    *,
    is_optional: bool = False,
    skips_broken: bool = False,
    host: Host | None = None,
) -> Reading:
    """Read a vm.conf as `parse_config` does, and return the result, errors included."""
    host = host or SystemHost()
    try:
        file = host.read_file(path)
    except OSError as err:
        if is_optional and isinstance(err, FileNotFoundError):
            return Reading()
        return Reading(errors=(shown(f"failed to open {path}: {err.strerror}"),))
    known = Macros(macros)
    parser = _Parser(Tokens(path, file.data, known), known, host, skips_broken=skips_broken)
    if file.complaint is not None:
        parser.notes.append(f"{path}: {file.complaint}")
    config = parser.parse()
    return Reading(
        config,
        tuple(map(shown, parser.tokens.complaints)),
        tuple(map(shown, parser.notes)),
        tuple(map(shown, known.unused())),
    )


def shown(line: str) -> str:
    """Return a line about a vm.conf as a terminal or a log may show it; tabs stay."""
    return printable(line, kept="\t")


class _Parser:
    """Statements, from the first to the last."""

    def __init__(self, tokens: Tokens, macros: Macros, host: Host, *, skips_broken: bool) -> None:
        self.tokens = tokens
        self._skips_broken = skips_broken
        self._config = Config()
        self._vms: list[VmConfig] = []
        self._switches: list[SwitchConfig] = []
        self.notes: list[str] = []
        self._macros = macros
        self._host = host
        self._includes = 0

    def parse(self) -> Config:
        """Take all statements; return the configuration of the valid ones."""
        self._statements()
        return self._config._replace(vms=tuple(self._vms), switches=tuple(self._switches))

    def _statements(self) -> None:
        while True:
            try:
                if self.tokens.peek().kind is Kind.END:
                    return
                if self.tokens.accept("include"):
                    self._include()
                else:
                    self._statement()
                    self.tokens.expect("\n")
            except StatementError:
                if not self.tokens.recover():
                    return

    def _statement(self) -> None:
        tokens = self.tokens
        if tokens.is_at("\n"):
            return
        if tokens.peek().is_string:
            self._macro()
        elif tokens.is_at("switch"):
            self._switches.append(SwitchRule(tokens).parse())
        elif tokens.is_at("vm"):
            self._vm()
        elif tokens.accept("local"):
            self._local()
        elif tokens.accept("socket"):
            tokens.expect("owner")
            self._config = self._config._replace(socket_owner=tokens.owner(self._host))
        elif tokens.accept("agentx"):
            self._agentx()
        elif tokens.accept("staggered"):
            self._staggered()
        else:
            tokens.syntax_error()

    def _vm(self) -> None:
        """Take a VM; with `skips_broken`, one that names a missing file is left out."""
        rule = VmRule(self.tokens, self._host, skips_missing=self._skips_broken)
        vm = rule.parse()
        if not rule.missing:
            self._vms.append(vm)
            return
        self.notes += rule.missing
        self.notes.append(f'{vm.where}: vm "{vm.name}" is left out')

    def _include(self) -> None:
        """Take `"include" string NL`; the contents of the files replace the line.

        One with `*`, `?` or `[` is a pattern: files come in the order of their names, if any do.
        """
        tokens = self.tokens
        path = tokens.string()
        if not tokens.is_at("\n"):
            tokens.syntax_error()
        paths = self._host.glob(path) if _PATTERN.search(path) else [path]
        self._includes += len(paths)
        if tokens.depth >= _DEPTH_MAX or self._includes > _INCLUDES_MAX:
            tokens.refuse(f"failed to include file {path}")
        files = []
        for each in paths:
            try:
                file = self._host.read_file(each)
            except OSError as err:
                tokens.refuse(f"failed to include file {each}: {err.strerror}")
            if file.complaint is not None:
                self.notes.append(f"{each}: {file.complaint}")
            files.append((each, file.data))
        tokens.take()
        tokens.include(files)
        included = (*self._config.includes, self._host.absolute(path))
        self._config = self._config._replace(includes=included)

    def _macro(self) -> None:
        """Take `macro = STRING "=" STRING`, or a word of ours, which may be a macro's name."""
        tokens = self.tokens
        word = next((each for each in OWN_WORDS if tokens.is_at_own(each)), None)
        name = tokens.one_string()
        if word and not tokens.is_at("="):
            match word:
                case "limit":
                    self._limit()
                case "snapshots":
                    self._snapshots()
                case _:
                    self._clock()
            return
        tokens.expect("=")
        value = tokens.one_string()
        if any(char in name for char in " \t\n\v\f\r"):
            tokens.refuse("macro name cannot contain whitespace")
        self._macros.define(name, value)

    def _snapshots(self) -> None:
        """Take `STRING`, a directory, after `"snapshots"`."""
        path = self.tokens.one_string()
        if not path.startswith("/"):
            self.tokens.refuse("snapshots path is not absolute")
        if byte_length(path) > PATH_BYTES_MAX:
            self.tokens.refuse("snapshots path too large")
        self._config = self._config._replace(snapshots=path)

    def _clock(self) -> None:
        """Take `"frozen" | "now"`, after `"clock"`."""
        tokens = self.tokens
        clock = next((each for each in GuestClock if tokens.is_at_own(each)), None)
        if clock is None:
            tokens.syntax_error()
        tokens.take()
        self._config = self._config._replace(clock=clock)

    def _local(self) -> None:
        """Take `"local" ( "prefix" STRING [ "nat" ] | "inet6" [ "prefix" STRING ] )`."""
        tokens = self.tokens
        if tokens.accept("prefix"):
            text = tokens.one_string()
            prefix = tokens.checked(prefix4_of, text, "invalid local prefix: ")
            is_nat = tokens.is_at_own("nat")
            if is_nat:
                tokens.take()
            self._config = self._config._replace(local_prefix=prefix, is_nat=is_nat)
            return
        tokens.expect("inet6")
        self._config = self._config._replace(is_local_inet6=True)
        if tokens.accept("prefix"):
            text = tokens.one_string()
            prefix = tokens.checked(prefix6_of, text, "invalid local inet6 prefix: ")
            self._config = self._config._replace(local_prefix6=prefix)

    def _agentx(self) -> None:
        """Take `"agentx" { "context" STRING | "path" STRING }`."""
        tokens, context, path = self.tokens, "", AGENTX_PATH
        while True:
            if tokens.accept("context"):
                context = tokens.one_string()
                if byte_length(context) > _AGENTX_CONTEXT_MAX:
                    tokens.refuse("agentx context too large")
            elif tokens.accept("path"):
                path = tokens.one_string()
                if byte_length(path) > _SOCKET_PATH_MAX:
                    tokens.refuse("agentx path too large")
                if not path.startswith("/"):
                    tokens.refuse("agentx path is not absolute")
            else:
                break
        self._config = self._config._replace(agentx=Agentx(context, path))

    def _limit(self) -> None:
        """Take what stands after `"limit"`.

        limit = ( "vms" | "cpus" | "snapshots" ) NUMBER | ( "memory" | "storage" ) size
        """
        tokens = self.tokens
        limits = self._config.limits
        if tokens.accept("memory"):
            limits = limits._replace(memory=self._size("memory"))
        elif tokens.is_at_own("storage"):
            tokens.take()
            limits = limits._replace(storage=self._size("storage"))
        elif tokens.is_at_own("snapshots"):
            tokens.take()
            limits = limits._replace(snapshots=tokens.number())
        elif tokens.is_at_own("vms"):
            tokens.take()
            limits = limits._replace(vms=tokens.number())
        elif tokens.is_at_own("cpus"):
            tokens.take()
            limits = limits._replace(cpus=tokens.number())
        else:
            tokens.syntax_error()
        if min(limits) < 0:
            tokens.refuse(f"invalid limit: {min(limits)}")
        self._config = self._config._replace(limits=limits)

    def _size(self, what: str) -> int:
        """Take `size = NUMBER | STRING`."""
        tokens = self.tokens
        size: int | str = tokens.one_string() if tokens.peek().is_string else tokens.number()
        try:
            return scan_scaled(size) if isinstance(size, str) else size
        except SizeError as err:
            tokens.refuse(f"invalid limit {what} {size}: {err}")

    def _staggered(self) -> None:
        """Take `"staggered" "start" "parallel" NUMBER "delay" NUMBER`."""
        tokens = self.tokens
        tokens.expect("start")
        tokens.expect("parallel")
        parallelism = tokens.number()
        tokens.expect("delay")
        delay_s = tokens.number()
        if parallelism < 1 or delay_s < 0:
            tokens.refuse(f"invalid staggered start: parallel {parallelism} delay {delay_s}")
        self._config = self._config._replace(staggered=Staggered(parallelism, delay_s))
