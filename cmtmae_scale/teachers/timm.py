"""Find, build and load teachers from timm: DINOv3, EVA-02, PE, SigLIP, CLIP, ConvNeXt and others.

Source: docs/method.md, section "Teacher".
"""

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import QuickGELU
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cmtmae_scale.config.schema import Teacher as TeacherConfig
from cmtmae_scale.config.teachers import entry_message
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.build import VIT_MODULES
from cmtmae_scale.teachers.base import Tower
from cmtmae_scale.teachers.original_names import convert_names, find_filter
from cmtmae_scale.teachers.state_dicts import (
    find_non_finite,
    keep_blocks,
    load_strictly,
    summarise_names,
)
from cmtmae_scale.teachers.timm_towers import (
    EvaTower,
    FeatureTower,
    TimmTower,
    set_size,
    stage_shapes,
)
from cmtmae_scale.teachers.weights import describe_unreachable, is_file_name, read_weights

logger = logging.getLogger(__name__)

QUICK_GELU_TAGS = ("openai", "dfn2b", "dfn5b", "metaclip_400m", "metaclip_2pt5b")
CLASSIFIER = ("head", "head_dist")


class TimmSource:
    """Find and build a model.

    Raises:
        TeacherError: for an unknown model or tag, or a model without features on a grid.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.name, _, tag = str(config.model).partition(".")
        weights = str(config.weights)
        if not timm.is_model(self.name):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
            raise TeacherError(f"teacher.model={config.model} is not a model of timm; {hint}")
        self.local = is_file_name(weights)
        self.tag = "" if self.local or weights == "random" else weights
        if tag and self.tag and tag != self.tag:
            raise TeacherError(
                f"teacher.weights={weights}, but teacher.model={config.model} names {tag}; drop one"
            )
        known = list_tags(self.name)
        for wanted in filter(None, (tag, self.tag)):
            if wanted not in known:
                raise TeacherError(
                    f"teacher.weights={wanted} is neither a file nor a tag of {self.name}; its "
                    f"tags: {', '.join(known) or 'none'}"
                )
        # the tag also determines mean and standard deviation of the pixels
        self.full_name = ".".join(filter(None, (self.name, self.tag or tag)))
        self.is_eva = False
        with torch.device("meta"):
            self.probe: Any = self.create(pretrained=False, initialised=False)
        self.is_eva = isinstance(self.probe, Eva)
        if isinstance(self.probe, VisionTransformer | Eva):
            self.patch = int(self.probe.patch_embed.patch_size[0])
        else:
            size = int(self.probe.pretrained_cfg["input_size"][-1])
            _, (_, rows, _) = self.last_stage(size)
            self.patch = size // rows
        self.quick_gelu = self.check_activation(self.probe, self.tag or tag)

    def create(self, *, pretrained: bool, initialised: bool = True) -> nn.Module:
        """Build the model at its default size, without classifier.

        Args:
            pretrained: download its weights.
            initialised: draw timm's initial weights; else torch's remain, until others are loaded.
        """
        options: dict[str, Any] = {"num_classes": 0}
        if not initialised and is_model_in_modules(self.name, VIT_MODULES):
            options["weight_init"] = "skip"
        if self.is_eva:
            options["dynamic_img_size"] = False  # else DINOv3's positions are computed per forward
        return timm.create_model(self.full_name, pretrained=pretrained, **options)

    def last_stage(self, size: int) -> tuple[int, tuple[int, ...]]:
        """Return how many stages are kept, and C, rows and columns of the last of them.

        Raises:
            TeacherError: for a network without features on a grid, or another size or depth.
        """
        try:
            shapes = stage_shapes(self.probe, size)
        except TeacherError as error:
            raise TeacherError(f"teacher.model={self.config.model}: {error}") from error
        kept = self.resolve_depth(len(shapes), "stages")
        return kept, shapes[kept - 1]

    def resolve_depth(self, full: int, parts: str) -> int:
        """Return how many of a model's ``full`` blocks or stages are kept.

        Raises:
            TeacherError: for more than the model has.
        """
        depth = self.config.depth
        if depth is not None and depth > full:
            raise TeacherError(
                f"teacher.depth={depth}: teacher.model={self.config.model} has {full} {parts}"
            )
        return depth or full

    def check_activation(self, probe: nn.Module, tag: str) -> bool:
        """Return whether the model has QuickGELU; refuse weights trained with another activation.

        Raises:
            TeacherError: naming ``teacher.quick_gelu``.
        """
        is_vit = isinstance(probe, VisionTransformer)
        mlp = getattr(probe.blocks[0], "mlp", None) if is_vit else None
        built = isinstance(getattr(mlp, "act", None), QuickGELU)
        asked = self.config.quick_gelu
        if asked is not None and asked != built:
            raise TeacherError(
                f"teacher.quick_gelu={str(asked).lower()}, but teacher.model={self.config.model} "
                f"of timm is built {'with' if built else 'without'} QuickGELU; choose the model "
                f"{'without' if built else 'with'} quickgelu in its name"
            )
        if asked is not None or built or not is_vit or "clip" not in self.name:
            return built
        twin = self.name.replace("_clip_", "_clip_quickgelu_")
        has_twin = twin != self.name and timm.is_model(twin)
        if tag in QUICK_GELU_TAGS or (has_twin and tag in list_tags(twin)):
            raise TeacherError(
                f"teacher.weights={tag} were trained with QuickGELU, teacher.model="
                f"{self.config.model} computes GELU; choose the model with clip_quickgelu in its "
                "name, or set teacher.quick_gelu=false to keep GELU"
            )
        if has_twin and self.local and not tag:
            raise TeacherError(
                f"teacher.weights={self.config.weights}: a file of CLIP weights does not record "
                "its activation; set teacher.quick_gelu=false for weights of LAION and DataComp, "
                f"or teacher.model={twin} for those of OpenAI, DFN and MetaCLIP"
            )
        return built

    def build(self, image_size: int, seed: int, *, load: bool = True) -> Tower:
        """Build the model at one size, with its weights.

        Args:
            image_size: S, a multiple of the patch.
            seed: seed of random weights.
            load: False keeps the initialised weights and downloads nothing (dry run).

        Raises:
            TeacherError: for weights that are missing, not reachable or do not fit.
        """
        config = self.config
        is_transformer = isinstance(self.probe, VisionTransformer | Eva)
        kept, shape = (0, ()) if is_transformer else self.last_stage(image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = (
                self.download()
                if self.tag and load
                else self.create(pretrained=False, initialised=not (self.local and load))
            )
        found = find_non_finite(model.state_dict()) if self.tag and load else ""
        if found:
            raise TeacherError(f"teacher.weights={self.tag}: {found}; choose another tag")
        if is_transformer:
            full = len(model.blocks)
            model.blocks = model.blocks[: self.resolve_depth(full, "blocks")]
        set_size(model, image_size)
        if self.local and load:
            self.load(model, str(config.weights))
        source: dict[str, object] = {
            "library": "timm",
            "library_version": timm.__version__,
            "model": self.full_name,
            "weights": Path(str(config.weights)).name if self.local else config.weights,
            "weights_file": config.weights if self.local else None,
            "seed": seed if config.weights == "random" else None,
            "quick_gelu": self.quick_gelu,
        }
        if isinstance(model, Eva):
            tower = EvaTower(model, self.full_name, source)
        elif isinstance(model, VisionTransformer):
            tower = TimmTower(model, self.full_name, source)
        else:
            model.prune_intermediate_layers([kept - 1], prune_norm=True)
            tower = FeatureTower(model, self.full_name, shape, source | {"stages": kept})
        logger.info(
            "teacher: %s, pixels with mean %s and std %s", tower.name, tower.mean, tower.std
        )
        return tower

    def download(self) -> nn.Module:
        """Download a tag's weights, or find them in the library's cache.

        Raises:
            TeacherError: if they are not reachable; names the remedy.
        """
        try:
            return self.create(pretrained=True)
        except Exception as error:  # each transport has its own; all end the run with the remedy
            published: Any = timm.get_pretrained_cfg(self.full_name)
            raise describe_unreachable(
                self.tag,
                error,
                repository=published.hf_hub_id or "",
                url=published.url or "",
                files={"teacher.weights": published.hf_hub_filename or HF_SAFE_WEIGHTS_NAME},
                settings=[f"teacher.model={self.full_name}"],  # its tag determines the pixels
            ) from error

    def load(self, model: Any, path: str) -> None:
        """Load a file strictly, its positions resampled to the grid; the classifier is not used."""
        state = read_weights(path)
        own = model.state_dict()
        fits = own.get("patch_embed.proj.weight")
        for key in ("patch_embed.proj.weight", "visual.conv1.weight"):
            if fits is None or key not in state:
                continue
            here, there = list(fits.shape), list(state[key].shape)
            if len(there) == 4 and there != here:  # timm resamples another patch size silently
                raise TeacherError(
                    f"teacher.weights={path} does not fit teacher.model={self.config.model}: {key} "
                    f"is {there} instead of {here}; set "
                    "teacher.model to that of the file"
                )
        heads = classifier_names(model)
        if isinstance(model, VisionTransformer | Eva):
            try:
                state, _, unused = convert_names(model, state)
            except ValueError as error:
                where = f"teacher.weights={path} does not fit teacher.model={self.config.model}"
                raise TeacherError(f"{where}: {error}") from error
            if unused:
                names = summarise_names(list(unused))
                text = f"teacher.weights={path}: {len(unused)} tensors are not used ({names})"
                logger.info("%s", entry_message(text))
        elif (convert := find_filter(model)) is not None:
            try:
                state = dict(convert(state, model))
            except Exception as error:  # each of them fails in its own way for another model's file
                raise TeacherError(
                    f"teacher.weights={path} does not fit teacher.model={self.config.model} "
                    f"({type(error).__name__}: {error}); give the file of this model"
                ) from error
        state = {name: value for name, value in state.items() if name.split(".")[0] not in heads}
        state |= {name: value for name, value in own.items() if name.split(".")[0] in heads}
        if isinstance(model, VisionTransformer | Eva):
            state = keep_blocks(state, "blocks", len(model.blocks))
        load_strictly(
            model,
            state,
            path,
            str(self.config.model),
            "give the file of this model, or the teacher.model and teacher.depth of the file",
        )


def list_tags(name: str) -> list[str]:
    """Return the tags of a model's published weights."""
    return [one.partition(".")[2] for one in get_arch_pretrained_cfgs(name)]


def classifier_names(model: Any) -> set[str]:
    """Return the names of a model's modules that hold its classifier."""
    named = model.pretrained_cfg["classifier"] or ()
    names = [named] if isinstance(named, str) else list(named)
    return {*CLASSIFIER, *(name.split(".")[0] for name in names)}
