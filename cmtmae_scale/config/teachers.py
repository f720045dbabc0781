"""One or several teachers: their weights, a config of each alone, and its keys in messages."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config, NamedTeacher, Teacher
from cmtmae_scale.errors import CmtMaeError, ConfigError

ENTRY_KEYS = {
    "attention.source": "attention_source",
    "attention.layers": "attention_layers",
    "target.teacher.norm": "norm",
    "target.teacher.layers": "layers",
    "cache.dir": "cache_dir",
}
"""Keys that an entry of ``teachers`` replaces -> their names in the entry."""


def used_teachers(config: Config) -> list[NamedTeacher]:
    """Return the entries of ``teachers`` that the mask or the loss uses, in order."""
    need = needs(config)
    return [
        one
        for one in config.teachers
        if (one.map > 0 and need.teacher_attention) or (one.loss > 0 and need.teacher_features)
    ]


def term_name(name: str) -> str:
    """Return a teacher's name in losses, logs and weights; an empty name: a single teacher."""
    return f"teacher_{name}" if name else "teacher"


def has_pairs(config: Config) -> bool:
    """Return whether the masks use the attention maps of two or more teachers."""
    maps = [one for one in config.teachers if one.map > 0]
    return needs(config).teacher_attention and len(maps) > 1


def teacher_shares(config: Config) -> dict[str, float]:
    """Return the weight of each teacher's term in their mean; the weights, if any, sum to 1."""
    if not needs(config).teacher_features:
        return {}
    if not config.teachers:
        return {term_name(""): 1.0}
    weights = {term_name(one.name): one.loss for one in config.teachers if one.loss > 0}
    whole = sum(weights.values())
    return {term: weight / whole for term, weight in weights.items()}


def has_teacher_mean(config: Config) -> bool:
    """Return whether the log has ``loss/teacher``, a weighted mean, beside the teachers' terms."""
    return len(config.teachers) > 0 and len(teacher_shares(config)) > 0


def attention_map_weights(config: Config) -> dict[str, float]:
    """Return the weights of the teachers' attention maps by name, empty for a single teacher."""
    return {one.name: one.map for one in config.teachers} or {"": 1.0}


def teacher_config(config: Config, entry: NamedTeacher) -> Config:
    """Return the config of a run whose only teacher is an entry of ``teachers``.

    Teacher, attention map, target, cache and uses of the teacher are those of the entry.
    """
    attention, target = config.attention, config.target.teacher
    mixing, loss = config.collaboration, config.loss
    return replace(
        config,
        teachers=[],
        teacher=Teacher(**{one.name: getattr(entry, one.name) for one in fields(Teacher)}),
        attention=replace(
            attention,
            source=entry.attention_source or attention.source,
            layers=entry.attention_layers or attention.layers,
        ),
        target=replace(
            config.target,
            teacher=replace(
                target, norm=entry.norm or target.norm, layers=entry.layers or target.layers
            ),
        ),
        collaboration=mixing if entry.map > 0 else replace(mixing, alpha_attention=0.0),
        loss=loss if entry.loss > 0 else replace(loss, teacher=0.0),
        cache=replace(config.cache, dir=entry_cache_dir(config, entry)),
    )


def entry_cache_dir(config: Config, entry: NamedTeacher) -> str | None:
    """Return the folder of the cache of an entry of ``teachers``, if there is one."""
    if entry.cache_dir:
        return entry.cache_dir
    if config.cache.dir or entry.mode == "sidecar":
        return str(cache_folder(config) / entry.name)
    return None


def teacher_configs(config: Config) -> dict[str, Config]:
    """Return one config per teacher that the run uses, by name; each has a single teacher.

    Without ``teachers`` it is the config itself under an empty name, whether or not it is used.
    """
    if not config.teachers:
        return {"": config}
    return {one.name: teacher_config(config, one) for one in used_teachers(config)}


def pick_teacher(config: Config, name: str | None, option: str = "--teacher ") -> Config:
    """Return the config of the named teacher; a recipe without ``teachers`` takes no name.

    ``option`` is the option that gives the name, for messages.

    Raises:
        ConfigError: lists the names.
    """
    names = [one.name for one in config.teachers]
    if not names and name is None:
        return config
    if name in names:
        return teacher_config(config, config.teachers[names.index(name)])
    if not names:
        raise ConfigError(f"{option}{name}: there is a single teacher; omit the name")
    found = "" if name is None else f"; found {option}{name}"
    raise ConfigError(
        f"there are several teachers; give {option}NAME, NAME one of {', '.join(names)}{found}"
    )


_entry: ContextVar[str] = ContextVar("entry", default="")
"""Name of the entry of ``teachers`` whose errors ``entry_errors`` names."""


def entry_text(text: str, name: str) -> str:
    """Return a message about a single teacher with the keys of an entry of ``teachers``.

    A message without such keys begins with the entry. ``name`` is empty for a single teacher.
    """
    if not name:
        return text
    for key, own in ENTRY_KEYS.items():
        text = re.sub(rf"(?<![\w.]){re.escape(key)}\b", f"teachers.{name}.{own}", text)
    keys = "|".join(one.name for one in fields(NamedTeacher))
    text = re.sub(rf"(?<![\w.])teacher\.(?=({keys})\b)", f"teachers.{name}.", text)
    return text if f"teachers.{name}" in text else f"teachers.{name}: {text}"


@contextmanager
def entry_errors(name: str) -> Generator[None, None, None]:
    """Make errors name the keys of an entry of ``teachers``; see ``entry_text``.

    Log lines of the block name these keys where ``entry_message`` returned the text.
    """
    before = _entry.set(name)
    try:
        yield
    except CmtMaeError as error:
        text = entry_text(str(error), name)
        if text == str(error):
            raise
        named = type(error)(text)
        named.exit_code = error.exit_code  # another rank's error may differ from its class
        raise named from error.__cause__
    finally:
        _entry.reset(before)


def entry_message(text: str) -> str:
    """Return a message about a single teacher with the keys of the entry that is being built."""
    return entry_text(text, _entry.get())


def has_rows(teacher: Teacher) -> bool:
    """Return whether the rows of a teacher are read from a cache."""
    return teacher.mode in ("cached", "sidecar")


def reads_cache(config: Config) -> bool:
    """Return whether the rows of any teacher are read from a cache."""
    return any(map(has_rows, config.teachers or [config.teacher]))


def cache_folder(config: Config) -> Path:
    """Return the folder of the cache; the default is the run's own."""
    return Path(config.cache.dir) if config.cache.dir else Path(config.run.output_dir) / "cache"


def online_fraction(config: Config) -> float:
    """Return the expected share of micro-batches in which the single teacher runs."""
    if not needs(config).teacher or config.teacher.mode == "none":
        return 0.0
    return config.cache.spot_check if reads_cache(config) else 1.0


def builds_teacher(config: Config) -> bool:
    """Return whether a training process builds a teacher, which cache misses may need."""
    if config.teachers:
        return any(map(builds_teacher, teacher_configs(config).values()))
    misses = reads_cache(config) and config.cache.on_miss == "online"
    return online_fraction(config) > 0 or (misses and needs(config).teacher)
