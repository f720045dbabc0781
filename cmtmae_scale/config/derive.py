"""Numbers and needs that are derived from a config, and never stored."""

from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config, Student
from cmtmae_scale.config.teachers import teacher_shares, term_name

SIZES = ("width", "depth", "heads")
"""Keys of ``student`` that replace sizes of its architecture."""


def loss_terms(config: Config) -> tuple[str, ...]:
    """Return the terms of a run's loss, in order: teachers, student, pixel."""
    need = needs(config)
    student, pixel = ("student",) * need.student_features, ("pixel",) * need.pixels
    return (*teacher_shares(config), *student, *pixel)


def find_scale_problem(config: Config) -> str | None:
    """Return why the weights of the targets are not comparable; ``None``: they are.

    Squared errors of ``l2`` are about 1/F of those of the other norms, over F channels.
    """
    norms = target_norms(config)
    terms = {name: norms[name] for name in loss_terms(config) if name in norms}
    small, others = ([n for n in terms if (terms[n] == "l2") == is_l2] for is_l2 in (True, False))
    if config.loss.type == "cosine" or not small or not others:
        return None
    return (
        f"loss.type={config.loss.type}: the norm of {', '.join(small)} is l2, with a mean square "
        f"of 1/F over F channels, that of {', '.join(others)} is not: they "
        "are not weighed alike; set all norms to ln, or loss.type=cosine"
    )


def target_norms(config: Config) -> dict[str, str]:
    """Return the norms of all features that may be targets, by term."""
    target = config.target
    own = {term_name(one.name): one.norm or target.teacher.norm for one in config.teachers}
    return {term_name(""): target.teacher.norm, **own, "student": target.student.norm}


def loaded_start(student: Student) -> tuple[str, str] | None:
    """Return the key that loads the initial weights, and its value; ``None``: none are loaded."""
    if student.init_from_run is not None:
        return "student.init_from_run", student.init_from_run
    if student.init_weights is not None:
        return "student.init_weights", student.init_weights
    return None


def find_unloaded_weights(student: Student) -> str | None:
    """Return why the published weights that the tag of ``student.arch`` names are not loaded.

    ``None``: its name has no tag, or a file or run gives the initial weights.
    """
    name, _, tag = student.arch.partition(".")
    if not tag or loaded_start(student) is not None:
        return None
    return (
        f"student.arch={student.arch}: the weights {tag} of timm are not loaded, and the student "
        f"starts from random weights; set student.init_weights=FILE, or student.arch={name}"
    )


def replaced_sizes(student: Student) -> dict[str, int]:
    """Return width, depth and heads where they replace the architecture's own."""
    sizes: dict[str, int | None] = {name: getattr(student, name) for name in SIZES}
    return {name: size for name, size in sizes.items() if size is not None}


def name_student(student: Student) -> str:
    """Return the architecture's name, with the sizes that replace its own."""
    sizes = ", ".join(f"{name} {size}" for name, size in replaced_sizes(student).items())
    return f"{student.arch} of {sizes}" if sizes else student.arch


def peak_lr(config: Config) -> float:
    """Return the learning rate after warm-up: ``base_lr * global_batch_size / 256``."""
    return config.optimizer.base_lr * config.train.global_batch_size / 256
