"""Build a student: timm's architecture at the sizes of a config, with added methods.

Source: docs/method.md, section "Student".
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# timm and parts of torch are only partly typed.
import math
from typing import Any, TypeVar, cast

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.schema import Student as StudentConfig
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.initialisation import TOKENS, fix_positions
from cmtmae_scale.method.rotary import supports_rotary, use_rotary
from cmtmae_scale.method.student import ATTENTIONS, MomentumEncoder, Student, become, use_attend

VIT_MODULES = {"vision_transformer", "deit"}
"""Modules of timm whose models may be a plain VisionTransformer."""
EVA_MODULES = {"eva"}
"""Modules of timm whose models are an Eva: DINOv3, EVA-02, PE and ViTs with rotary positions."""

S = TypeVar("S", bound=Student)


def build_student(config: Config, cls: type[S] = Student) -> S:
    """Build ``student.arch`` for images of ``views.image_size``.

    Args:
        config: checked settings.
        cls: ``Student``, or ``MomentumEncoder``, which is in eval mode and without gradients.

    Returns:
        The model on the default device, with fixed positional embeddings. ``initialise`` or a state
        dict sets its weights: tokens are zero, the rest is timm's default. Its keys are those of
        ``timm.create_model(arch, **timm_options(config))``, which has neither classifier nor
        pooling head, and its last norm before the pooling; so have the defaults of vit_base,
        vit_large and vit_huge.

    Raises:
        ConfigError: if timm has no such model, it is neither a plain VisionTransformer nor an Eva,
            or the sizes do not fit each other.
    """
    model = create_model(config.student.arch, **timm_options(config))
    with torch.no_grad():
        for name in TOKENS:
            if (token := getattr(model, name, None)) is not None:
                token.zero_()
        fix_positions(model)
    if isinstance(model, Eva):
        use_rotary(model)
    use_attend(model)
    student = become(model, cls)
    if isinstance(student, MomentumEncoder):
        student.configure(config)
        student.requires_grad_(False).eval()
    return student


def create_model(arch: str, **options: Any) -> VisionTransformer | Eva:
    """Call ``timm.create_model``; a VisionTransformer keeps torch's faster initialisation."""
    if is_model_in_modules(arch, VIT_MODULES):
        options["weight_init"] = "skip"
    return cast(VisionTransformer | Eva, timm.create_model(arch, **options))


def timm_options(config: Config) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` for a config's student, beside its name.

    Raises:
        ConfigError: as ``build_student``.
    """
    probe = probe_student(config)
    options = size_options(config) | {"global_pool": "avg" if probe.cls_token is None else "token"}
    if isinstance(probe, Eva):
        return options | {"use_fc_norm": False, "use_post_transformer_norm": True}
    return options | {"fc_norm": False}


def size_options(config: Config) -> dict[str, Any]:
    """Return those of timm's arguments that set the sizes and drop the classifier.

    Raises:
        ConfigError: if the heads do not divide the width.
    """
    student = config.student
    sizes = {
        "patch_size": student.patch_size,
        "embed_dim": student.width,
        "depth": student.depth,
        "num_heads": count_heads(student),
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    return {"num_classes": 0, "img_size": config.views.image_size} | given


def count_heads(student: StudentConfig) -> int | None:
    """Return the attention heads of a student; ``None``: the architecture's own.

    Raises:
        ConfigError: if they do not divide the width.
    """
    if student.width is None and student.heads is None:
        return None
    own = probe_arch(student.arch)
    own_heads = next(one.num_heads for one in own.blocks.modules() if isinstance(one, ATTENTIONS))
    head_width = own.embed_dim // own_heads
    width = student.width or own.embed_dim
    if student.heads is None:
        if width % head_width:
            below = width // head_width * head_width
            raise ConfigError(
                f"student.width={width} is not a multiple of {head_width}, the channels per head "
                f"of {student.arch}; use {f'{below} or ' if below else ''}{below + head_width}, or "
                f"set student.heads to a divisor of {width}"
            )
        return width // head_width
    if width % student.heads:
        fits = math.gcd(width, student.heads) if width % head_width else width // head_width
        raise ConfigError(
            f"student.heads={student.heads} does not divide the student's width {width}; set "
            f"student.heads to a divisor of {width}, such as {fits}"
        )
    if isinstance(own, Eva) and own.rope is not None and width // student.heads % 4:
        raise ConfigError(
            f"student.heads={student.heads} gives each head {width // student.heads} channels of "
            f"{width}; rotary positions need a multiple of 4, such as {head_width}"
        )
    return student.heads


def probe_arch(arch: str) -> VisionTransformer | Eva:
    """Build an architecture at its own sizes on the meta device, of one block where it can be.

    Raises:
        ConfigError: if the student's forward does not support it.
    """
    check_name(arch)
    with torch.device("meta"):
        try:
            model = create_model(arch, num_classes=0, depth=1)
        except AssertionError:  # settings of every block are listed
            model = create_model(arch, num_classes=0)
    return check_supported(model, arch)


def probe_student(config: Config) -> VisionTransformer | Eva:
    """Build ``student.arch`` on the meta device, for its shapes alone.

    Raises:
        ConfigError: as ``build_student``.
    """
    arch, size = config.student.arch, config.views.image_size
    check_name(arch)
    options = size_options(config)
    try:
        with torch.device("meta"):
            model = create_model(arch, **options)
    except AssertionError as error:  # timm's check of sizes against each other
        raise ConfigError(
            f"student.arch={arch}: timm does not build it with {options} ({error}); set "
            "student.width, student.depth and student.heads to the architecture's own"
        ) from error
    probe = check_supported(model, arch)
    side = cast(int, probe.patch_embed.patch_size[0])
    if size % side:
        below = size // side * side
        raise ConfigError(
            f"views.image_size={size} is not a multiple of the student's patch side {side}; "
            f"use {f'{below} or ' if below else ''}{below + side}"
        )
    return probe


def check_name(arch: str) -> None:
    """Refuse names of no model or weights of timm, and of other kinds of models.

    Raises:
        ConfigError: names what was found.
    """
    if not timm.is_model(arch):
        raise ConfigError(
            f"student.arch={arch} is not a model of timm {timm.__version__}; "
            "timm.list_models('vit_*') lists them"
        )
    name, _, tag = arch.partition(".")
    if tag and arch not in get_arch_pretrained_cfgs(name):
        raise ConfigError(
            f"student.arch={arch}: timm has no weights {tag} of {name}; name the architecture "
            f"alone, student.arch={name}"
        )
    if not is_model_in_modules(arch, VIT_MODULES | EVA_MODULES):
        raise unsupported_arch(arch, "another kind of model")


def unsupported_arch(arch: str, found: str) -> ConfigError:
    """Return the error for an unsupported architecture."""
    return ConfigError(
        f"student.arch={arch} is {found}; use a VisionTransformer or an Eva of timm, such as "
        "vit_base_patch16_224 or vit_base_patch16_dinov3"
    )


def check_supported(model: nn.Module, arch: str) -> VisionTransformer | Eva:
    """Return a model that the student's forward supports.

    Raises:
        ConfigError: if it is neither a plain VisionTransformer nor an Eva; names what was found.
    """
    kind = type(model)
    if not isinstance(model, VisionTransformer | Eva) or kind not in (VisionTransformer, Eva):
        raise unsupported_arch(arch, f"a {kind.__name__}")
    if isinstance(model, Eva) and not supports_rotary(model):
        raise unsupported_arch(arch, f"a model with {type(model.rope).__name__}")
    if model.pos_embed is None and getattr(model, "rope", None) is None:
        raise unsupported_arch(arch, "a model without positional embedding")
    if model.embed_dim % 4:
        raise unsupported_arch(
            arch, f"{model.embed_dim} channels wide, which is not a multiple of 4"
        )
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise unsupported_arch(arch, "a model that drops patches")
    if len(set(model.patch_embed.patch_size)) != 1:
        raise unsupported_arch(
            arch, f"a model with patches of {model.patch_embed.patch_size} pixels"
        )
    if any(getattr(module, "gate", None) is not None for module in model.modules()):
        raise unsupported_arch(arch, "a model with gated attention")
    return model
