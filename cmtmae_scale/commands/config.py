"""``cmtmae config [KEY]``: meaning, accepted values, default and use of a key, from the schema."""

import argparse
import difflib
import sys
import textwrap
from collections.abc import Iterator, Sequence

from cmtmae_scale.commands.alone import run_alone
from cmtmae_scale.config.describe import TASKS, Group, Key, find_uses, list_groups, list_keys
from cmtmae_scale.config.hints import key_hint
from cmtmae_scale.config.schema import Schedule
from cmtmae_scale.errors import EXIT_DONE, ConfigError
from cmtmae_scale.runtime.arguments import Parser

PRE_TRAINING, FINE_TUNING = TASKS
WIDTH = 96
PAGE = """# Config keys

Written by `cmtmae config --markdown`, from the schema; do not edit. `cmtmae config KEY` prints one
key, and the modules that read it. A recipe is a YAML file with these groups. On the command line
`group.key=value` overrides it, in YAML's notation, text as it is; `null` means off.
"""


def describe_config(arguments: Sequence[str] | None = None) -> int:
    """Print the groups, a group, a key, or the whole page; returns the exit code."""
    options = parse_options(arguments)

    def describe() -> int:
        sys.stdout.write(config_page() if options.markdown else answer(options.key))
        return EXIT_DONE

    return run_alone(describe, lambda text: sys.stderr.write(f"{text}\n"))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``[KEY | --markdown]``; a usage error exits with 78."""
    parser = Parser(description="Describe the keys of a recipe.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("key", nargs="?", metavar="KEY", help="a group or a key, such as mask.ratio")
    what.add_argument("--markdown", action="store_true", help="print all keys as docs/config.md")
    return parser.parse_args(arguments)


def answer(name: str | None) -> str:
    """Return the text about a group or a key; ``None``: the list of groups.

    Raises:
        ConfigError: there is no such group or key; names the nearest.
    """
    if name is None:
        return "\n".join(overview_lines())
    found = {task: keys_below(name, list_groups(schema)) for task, schema in TASKS.items()}
    if not any(found.values()):
        raise ConfigError(f"{name} is neither a key nor a group of a recipe; {nearest(name)}")
    tasks: dict[tuple[Key, ...], list[str]] = {}
    for task, keys in found.items():
        if keys:
            tasks.setdefault(tuple(keys), []).append(task)
    lines: list[str] = []
    for keys, names in tasks.items():
        lines += [f"{' and '.join(names)}:", ""]
        for key in keys:
            lines += [*key_lines(key, with_uses=len(keys) == 1), ""]
    return "\n".join(lines)


def overview_lines() -> Iterator[str]:
    """Yield the lines of the list of groups."""
    for task, schema in TASKS.items():
        yield f"groups of {task}:"
        for group in list_groups(schema):
            yield f"  {group.name:<15}{group.meaning}"
        yield ""
    yield "cmtmae config GROUP describes the keys of a group, cmtmae config GROUP.KEY one of them\n"


def keys_below(name: str, groups: Sequence[Group]) -> list[Key]:
    """Return the key of a name, or all keys of the group of that name."""
    keys = [key for group in groups for key in group.keys]
    return [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]


def key_lines(key: Key, with_uses: bool) -> Iterator[str]:
    """Yield the lines about one key."""
    yield key.name
    yield textwrap.fill(key.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield f"  takes    {key.values}"
    yield f"  default  {key.default}"
    if not with_uses:
        return
    if key.is_scheduled:
        yield "  schedule"
        for one in list_keys(Schedule(), ""):
            text = f"{one.name}: {one.meaning} ({one.values}; default {one.default})"
            indent = " " * 11
            yield textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
    uses = ", ".join(find_uses(key)) or "nowhere by this name; its group is passed on"
    yield textwrap.fill(f"used in  {uses}", WIDTH, initial_indent="  ", subsequent_indent=" " * 11)


def nearest(name: str) -> str:
    """Return what was probably meant by a name that is neither a key nor a group."""
    keys = {
        key.name for schema in TASKS.values() for one in list_groups(schema) for key in one.keys
    }
    groups = {key.rpartition(".")[0] for key in keys}
    hint = key_hint(name, keys)
    if hint is not None:
        return hint
    same = sorted(key for key in keys if key.rpartition(".")[2] == name)
    if same:
        return f"did you mean {' or '.join(same)}?"
    near = difflib.get_close_matches(name, [*sorted(keys), *sorted(groups)], 1, 0.5)
    return f"did you mean {near[0]}?" if near else "cmtmae config lists the groups"


def config_page() -> str:
    """Return ``docs/config.md``."""
    before = {group.name: group for group in list_groups(TASKS[PRE_TRAINING])}
    parts = [PAGE, "## Pre-training\n"]
    parts += [group_table(group, "### ") for group in before.values()]
    parts.append("## Schedules\n")
    parts.append(
        "A key that takes a schedule takes a number too. `key={kind: ...}` replaces the schedule, "
        "`key.start=...` changes a part of it.\n"
    )
    parts.append(key_table(list(list_keys(Schedule(), ""))))
    parts.append("## Fine-tuning\n")
    parts.append("Keys that are equal to those of pre-training are not repeated.\n")
    for group in list_groups(TASKS[FINE_TUNING]):
        known = before[group.name].keys if group.name in before else []
        own = [key for key in group.keys if key[:4] not in [one[:4] for one in known]]
        if own:
            parts.append(group_table(group._replace(keys=own), "### Fine-tuning: "))
        else:
            parts.append(f"### Fine-tuning: {group.name}\n\nAs for pre-training.\n")
    return "\n".join(parts)


def group_table(group: Group, heading: str) -> str:
    """Return a group as Markdown."""
    return f"{heading}{group.name}\n\n{group.meaning}\n\n{key_table(group.keys)}"


def key_table(keys: Sequence[Key]) -> str:
    """Return keys as a Markdown table."""
    lines = ["| key | meaning | takes | default |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.name}`", key.meaning, key.values, f"`{key.default}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
