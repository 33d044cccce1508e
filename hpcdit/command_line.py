"""From an argument list to plain values, by Hydra; every way to get it wrong becomes one InputError line.

Knows Hydra and nothing of what the keys mean: the keys come as arguments.
"""

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra import main as hydra_main

# Hydra's own reading of its flags: needed to see --multirun before it has made folders.
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hpcdit import __version__
from hpcdit.errors import InputError
from hpcdit.terminal import say

ONE_RUN = "use one command for each run (or an array job): a run here is one batch over all ranks"


def shown(value: object, limit: int = 80) -> str:
    """A value as an error message may hold it: as one would write it, on one line, cut off if long."""
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else one_line(repr(value), limit)


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, control characters escaped, its end cut off if long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 20]}... ({len(line)} characters)"


def unknown_key(key: str, keys: Collection[str]) -> InputError:
    """The error for a key that is none of `keys`, with the one that was probably meant."""
    by_last_part = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key[:100], keys, 1)
    close = close or difflib.get_close_matches(key[:100].rpartition(".")[2], by_last_part, 1)
    meant = f", did you mean {by_last_part.get(close[0], close[0])}?" if close else ""
    return InputError(f"{one_line(key, 80)}: unknown key (--help lists them){meant}")


@dataclass(frozen=True)
class Composed:
    """The values, nested, and which option of each group they come from."""

    values: dict[str, Any]
    groups: dict[str, str]


def compose(
    argv: Sequence[str],
    config_dir: Path,
    choices: Mapping[str, Collection[str]],
    text_keys: Collection[str],
    adjust: Callable[[DictConfig, Mapping[str, str]], None],
) -> Composed | None:
    """The configuration that `argv` asks for, or None when it asked for help or the like, which is printed.

    choices: every known key, with the values that it takes where those are a few words.
    text_keys: keys whose value is free text (paths): taken as it stands, no quotes needed.
    adjust: called with the configuration and its groups' options before ${references} are resolved.
    Raises InputError.
    """
    if "--version" in argv:
        say(f"hpcdit {__version__} (Hydra {version('hydra-core')})", sys.stdout)
        return None
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the folder that this was started in is gone ({error.strerror}): change into another"
        ) from None
    # argparse wants positional arguments in one piece; people add an override wherever they are.
    overrides = [_as_text(arg, text_keys) for arg in argv if _is_override(arg)]
    argv = [*overrides, *(arg for arg in argv if not _is_override(arg))]
    found: list[Composed] = []
    with _as_input_errors(choices):
        args = get_args_parser().parse_args(argv)
        if args.multirun:
            raise InputError(f"--multirun: not supported, {ONE_RUN}")
        if args.experimental_rerun is not None:
            raise InputError("--experimental-rerun: not supported, it would run what a pickle file holds")
        if not args.shell_completion:
            for override in OverridesParser.create().parse_overrides(args.overrides):
                _check(override, choices)
        _run_hydra(argv, config_dir, lambda config: found.append(_composed(config, adjust)))
    return found[0] if found else None


def _composed(config: DictConfig, adjust: Callable[[DictConfig, Mapping[str, str]], None]) -> Composed:
    groups = {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}
    adjust(config, groups)
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return Composed({str(key): value for key, value in values.items()}, groups)


def _run_hydra(argv: Sequence[str], config_dir: Path, use: Callable[[DictConfig], None]) -> None:
    def task(config: DictConfig) -> None:
        use(config)

    with _process_state(argv):
        hydra_main(version_base="1.3", config_path=str(config_dir), config_name="config")(task)()


@contextlib.contextmanager
def _process_state(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv; only an environment variable makes it raise its errors rather than print them."""
    old_argv, old_mode = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["hpcdit", *argv], "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_mode is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_mode


@contextlib.contextmanager
def _as_input_errors(choices: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Inside, whatever argparse, Hydra or OmegaConf complain of is raised as one InputError line."""
    printed, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code not in (0, None):  # argparse: its last line is the reason
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise InputError(f"{one_line(reason, 120)}; see --help") from None
    except OverrideParseException as error:
        hint = "write key=value, with quotes around a value that holds any of , = : ( ) [ ] { } or spaces"
        raise InputError(f"{shown(error.override)}: not understood, {hint}") from None
    except MissingConfigException as error:
        raise InputError(_missing_option(error, choices)) from None
    except (HydraException, OmegaConfBaseException) as error:
        cause = error if str(error) else error.__cause__
        key = getattr(cause, "full_key", None)
        reason = str(cause).partition("\n    full_key:")[0]
        raise InputError(one_line(f"{key}: {reason}" if key else reason)) from None
    except (ValueError, OSError, YAMLError) as error:
        # Hydra's own checks of its flags, and configuration files that cannot be read.
        raise InputError(one_line(str(error))) from None
    for text, stream in ((printed.getvalue(), sys.stdout), (said.getvalue(), sys.stderr)):
        if text:
            say(text, stream, end="")


def _missing_option(error: MissingConfigException, choices: Mapping[str, Collection[str]]) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return one_line(str(error))
    for key, words in choices.items():  # parallel=torus for parallel.method=torus
        if key.startswith(f"{group}.") and option in words:
            return f"{group}={option}: no such option of this group, did you mean {key}={option}?"
    _, _, after = str(error).partition(f"Available options in '{group}':")
    options = ", ".join(after.partition("\nConfig search path")[0].split())
    return f"{group}={one_line(option, 80)}: no such option of this group; there are {options or 'none'}"


def _check(override: Override, choices: Mapping[str, Collection[str]]) -> None:
    key = override.key_or_group.partition("@")[0]
    line = shown(override.input_line)
    if override.is_sweep_override():
        raise InputError(f"{line}: several values to try (quote it if it is one) are not supported; {ONE_RUN}")
    if key == "hydra.mode":
        raise InputError(f"hydra.mode: cannot be chosen, {ONE_RUN}")
    if key in ("hydra", "defaults", *choices) or key.startswith(("hydra.", "hydra/")):
        return
    inside = [known for known in choices if known.startswith(f"{key}.")]
    if not key or not inside:
        raise unknown_key(key or override.input_line or "", choices)
    value = override.value()
    if isinstance(value, str) and len(value) > 255:  # longer than a file name can be
        raise InputError(f"{line}: no such option of this group")
    if isinstance(value, int | float | list):
        raise InputError(f"{line}: {key} is a group of keys, set one of them: {', '.join(inside)}")


def _is_override(arg: str) -> bool:
    return not arg.startswith("-") and ("=" in arg or arg.startswith("~"))


def _as_text(arg: str, text_keys: Collection[str]) -> str:
    """key=value with the value in quotes, where the key takes free text: any path can be written as it is."""
    key, _, value = arg.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key.lstrip("+") not in text_keys or value == "null" or quoted:
        return arg
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"
