"""From a command line to videos: configuration, plan, render, exit code; what happens when a rank fails."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import one_line
from .config import Config, load
from .errors import BrokenRun, InputError, Stopped
from .guard import launched_rank
from .stop import StopRequest
from .terminal import say

if TYPE_CHECKING:
    from .cluster import Cluster, World
    from .render.batch import Batch

OK = 0


def main(argv: Sequence[str] | None = None, tell_guard: Callable[[float], None] = lambda timeout_s: None) -> int:
    """Runs the program; returns its exit code (see the README). tell_guard: is called with `transport.timeout_s`."""
    argv = sys.argv[1:] if argv is None else argv
    alone = {
        "mode=plan": plan,
        "mode=report": report,
    }  # need no MPI: clusters are planned, jobs looked at on any laptop
    mode = next((words for words in reversed(argv) if words.startswith("mode=")), "")  # the last counts, as in Hydra
    if mode in alone:
        return _say(lambda: alone[mode](argv), first=launched_rank() == 0)
    try:
        from .cluster import World, finalize

        world = World()
    except InputError as error:  # the same on all ranks
        if launched_rank() == 0:
            say(f"hpcdit: {error}")
        return error.exit_code
    except (ImportError, RuntimeError) as error:  # perhaps on this one alone: its guard then ends the others
        line = f"MPI cannot be started: {error}; load your site's MPI, or `pip install mpich`"
        say(f"hpcdit: rank {launched_rank()}: {line}")
        return InputError.exit_code if "PMI_RANK" not in os.environ else BrokenRun.exit_code

    def whole() -> int:
        stop = StopRequest()
        stop.listen()  # to the end: what is asked for while MPI ends changes nothing any more
        code = _say(lambda: _run(world, argv, stop, tell_guard), first=world.rank == 0)
        world.close()
        finalize(world.timeout_s)
        return code

    return guarded(world, whole)


def run(world: "World", argv: Sequence[str]) -> int:
    """Runs the program on the ranks of `world`; returns its exit code."""

    def body() -> int:
        with StopRequest() as stop:
            return _say(lambda: _run(world, argv, stop, lambda timeout_s: None), first=world.rank == 0)

    return guarded(world, body)


def guarded(world: "World", body: Callable[[], int]) -> int:
    """`body`'s exit code. What one rank cannot survive, in any thread, ends all ranks with that rank's message."""
    threading.excepthook = lambda args: world.abort(4, "".join(traceback.format_exception(args.exc_value)))
    try:
        return body()
    except BrokenRun as error:
        world.abort(error.exit_code, str(error))
    except BaseException:
        world.abort(4, traceback.format_exc())
    raise AssertionError("abort does not return")


def plan(argv: Sequence[str]) -> int:
    """`mode=plan`: prints the plan for a batch on a cluster, and why it is this one."""
    from .render.plan import report

    config = load(argv)
    if config is None:
        return OK
    say(report(config), sys.stdout)
    return OK


def report(argv: Sequence[str]) -> int:
    """`mode=report`: writes the page about what is in the output folder, and says where it is."""
    from .output.report.contents import check
    from .output.report.page import write

    config = load(argv)
    if config is None:
        return OK
    folder = Path(config.output.dir)
    try:
        check(folder)
        if launched_rank() == 0:
            say(f"hpcdit: {write(folder)}", sys.stdout)
    except (OSError, ValueError) as error:
        raise InputError(f"output.dir={config.output.dir}: no report: {one_line(str(error))}") from None
    return OK


def _run(world: "World", argv: Sequence[str], stop: StopRequest, tell_guard: Callable[[float], None]) -> int:
    values = world.agree(lambda: (config := load(argv)) and config.to_dict(), "the configuration")
    if values is None:
        return OK
    config = Config.from_dict(values)
    if config.mode in ("plan", "report"):
        return world.agree(lambda: (plan if config.mode == "plan" else report)(argv), f"the {config.mode}")
    world.keep_watch(config.transport.timeout_s)
    tell_guard(config.transport.timeout_s)
    from .cluster import Cluster
    from .render.batch import Batch, prepare

    cluster = Cluster(world, config.cluster.ranks_per_node)
    if config.cluster.nodes not in (None, cluster.node_count):
        raise InputError(
            f"cluster.nodes={config.cluster.nodes}: the {world.size} ranks that were started lie on"
            f" {cluster.node_count} node{'s' * (cluster.node_count > 1)}; allowed: that number, or null"
        )
    batch = world.agree(lambda: prepare(config, cluster.nodes).to_dict(), "the prompts")
    render = world.together(lambda: stop.leave(_program), "the program")
    code = render(config, world, cluster, Batch.from_dict(batch), stop)
    cluster.close()
    return code


def _program() -> Callable[[Config, "World", "Cluster", "Batch", StopRequest], int]:
    """What renders; its imports, torch and diffusers, take seconds, and minutes where the file system is slow."""
    from .render.run import render

    return render


def _say(body: Callable[[], int], first: bool) -> int:
    """`body`'s exit code; a user's error becomes one line, printed once, and its code."""
    try:
        return body()
    except (InputError, Stopped) as error:
        if first:
            say(f"hpcdit: {error}")
        return error.exit_code
