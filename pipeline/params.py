"""Parameters: `params.yaml` and the recipes, read into frozen models that refuse what they do not know.

Run as a program, it writes a recipe and single values into `params.yaml` and keeps the comments:
`python -m pipeline.params --recipe cifar10_lenet --set train.epochs=3`.
"""

import argparse
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML

from pipeline.artifacts import write_text
from pipeline.core.errors import UserError, redact_url, report_errors
from pipeline.core.validation import describe_value, explain, list_choices
from pipeline.core.yaml import dump_yaml, read_yaml

PARAMS_FILE = Path("params.yaml")
RECIPES_FOLDER = Path("recipes")
ALLOWED_FOLDERS = (
    "<class>/… or <split>/<class>/… with at least two classes, split being train (training), validation (val, valid, "
    "dev) or test (testing, holdout, eval), with words before or after it as in seg_train"
)
"""What `download.folder` may have in it."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(strict=True)]
"""A whole number; `3.0`, `"3"` and `true` are refused."""
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
"""A finite number; YAML reads `1e-3` as text (it wants `1.0e-3`), so text that is a number is taken as one."""
Dataset = Literal["digits", "cifar10", "imagefolder"]
"""The names of the data sources; how each is downloaded and read is in `pipeline/datasets/sources.py`."""
Channels = Literal[1, 3]
"""1 for gray, 3 for RGB."""
Resize = Literal["crop", "pad", "stretch"]
Views = Literal["none", "mirror", "mirror_and_shift"]
Selection = Literal["highest_accuracy", "latest_equivalent"]
CpuKernels = Literal["portable", "native"]
Flag = Annotated[bool, Field(strict=True)]


def bad_folder(found: str, remedy: str) -> UserError:
    """What to raise where the folder that `download.folder` names does not have what it should."""
    return UserError(f"download.folder: {found}; allowed: {ALLOWED_FOLDERS}; {remedy}")


def check_is_folder(folder: Path) -> None:
    """Raise UserError where `download.folder` names no folder."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise bad_folder(f"{str(folder)!r} {problem}", "correct the path")


class Section(BaseModel):
    """One section of `params.yaml`: immutable, complete (no default is hidden in code), nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DownloadParams(Section):
    """Where the raw data comes from."""

    dataset: Dataset = Field(
        description="digits (scikit-learn's, no download), cifar10 (fetched), or imagefolder (your own images)"
    )
    folder: Annotated[str, Field(min_length=1)] = Field(
        description="imagefolder: the folder with <class>/… or <split>/<class>/… (train, validation, test)"
    )
    urls: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = Field(
        description="cifar10: places of the archive, tried in turn: http(s)://, file://, or a path"
    )
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        description="cifar10: MD5 of the archive in hexadecimal, checked before anything in it is read"
    )
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        description="cifar10: give a place up after this long without a byte from it"
    )

    @property
    def origin(self) -> str | None:
        """Where the raw data comes from, without secrets; None where it comes with a package."""
        match self.dataset:
            case "cifar10":
                return redact_url(self.urls[0])
            case "imagefolder":
                return str(Path(self.folder).resolve())
            case _:
                return None

    @model_validator(mode="after")
    def _without_passwords(self) -> Self:
        for url in self.urls:
            if "@" in url.partition("://")[2].partition("/")[0]:
                raise ValueError(
                    f"urls: {redact_url(url)} comes with a user or password, which every run would record; "
                    "put it into ~/.netrc"
                )
        return self


class NormalizeParams(Section):
    """How raw images become arrays, and which of them train, validate and test."""

    image_size: Annotated[Count, Field(ge=8, le=1024)] = Field(description="pixels, height and width alike")
    channels: Literal["auto", 1, 3] = Field(description="1 (gray), 3 (RGB), or auto: what the data source has")
    resize: Resize = Field(
        description="how an image that is not square is made so: cut at the center, padded with black, or stretched"
    )
    validation_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        description="fraction of train used for validation in each class (where the source has no validation split)"
    )
    test_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        description="fraction of all images used for test in each class (where the source has no test split)"
    )
    max_unreadable_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="stop if more than this fraction of the files cannot be read"
    )
    near_duplicate_correlation: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="a test image that correlates at least this much with a training image is a near-duplicate; the "
        "right value depends on the images (0.9 for photographs, 0.98 for digits)"
    )
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = Field(description="draws the splits")


class TrainParams(Section):
    """What is trained, and how."""

    model: str = Field(
        description="lenet, airbench or another of pipeline/models/build.py, or any of torchvision (resnet18, …)"
    )
    weights: str | None = Field(
        description="null (from scratch), DEFAULT (torchvision's pretrained), or a .safetensors or .pth file of weights"
    )
    weights_md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = Field(
        description="MD5 of the file of weights in hexadecimal, by which its content is known; null where there is none"
    )
    input_size: Annotated[Count, Field(ge=16, le=1024)] | None = Field(
        description="pixels; enlarge the images to this on the device before the model sees them; null: as they are"
    )
    loss: Literal["cross_entropy", "mse"] = Field(description="mse compares the outputs with one-hot targets")
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = Field(description="for cross_entropy")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "muon"] = Field(
        description="sgd without momentum is the bare rule: weight - learning_rate * gradient; muon makes the updates "
        "of linear layers orthogonal, without weight decay, and leaves the rest to sgd"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = Field(description="peak learning rate, reached after the warm-up")
    momentum: Annotated[Number, Field(ge=0, lt=1)] = Field(description="for sgd, muon and rmsprop")
    nesterov: Flag = Field(description="for sgd and muon with momentum")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(description="L2 penalty; decoupled for adamw")
    gradient_clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        description="scale gradients down to this total norm; null: never"
    )
    bias_learning_rate_factor: Annotated[Number, Field(gt=0)] = Field(
        description="times learning_rate for the biases of batch normalization; their weight decay is divided by it"
    )
    schedule: Literal["constant", "step", "linear", "cosine", "one_cycle"] = Field(
        description="course of the learning rate"
    )
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="fraction of all steps over which the learning rate climbs to its peak"
    )
    step_epochs: Annotated[Number, Field(gt=0)] = Field(description="step: epochs between two drops")
    step_factor: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="step: the learning rate is multiplied by this at each drop"
    )
    epochs: Annotated[Count, Field(ge=1)] = Field(description="passes over the training split")
    selection: Selection = Field(
        description="which epoch is kept, and counts for early stopping. highest_accuracy: by validation accuracy, "
        "then lower validation loss, then the later epoch. latest_equivalent: the latest whose validation accuracy is "
        "inside the 95 % interval of the highest, for validation splits of up to a few hundred images"
    )
    early_stopping_epochs: Annotated[Count, Field(ge=1)] | None = Field(
        description="stop after this many epochs in a row that are no better than an earlier one, or with "
        "selection: latest_equivalent worse than one; null: never"
    )
    batch_size: Annotated[Count, Field(ge=1)] = Field(description="images a step; an incomplete last batch is left out")
    average_every_steps: Annotated[Count, Field(ge=1)] | None = Field(
        description="lookahead: pull the weights back to their running mean this often; null: never"
    )
    flip: Flag = Field(description="augmentation: mirror each image left to right in every other epoch, half in each")
    crop_padding: Annotated[Count, Field(ge=0)] = Field(
        description="augmentation: shift by up to this many pixels, the gap filled by reflection"
    )
    cutout_size: Annotated[Count, Field(ge=0)] = Field(
        description="augmentation: blank a square of this many pixels a side"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: cuda, else mps, else cpu")
    mixed_precision: Literal["none", "bfloat16", "float16"] = Field(description="on cuda; elsewhere float32 is used")
    channels_last: Flag = Field(description="memory layout NHWC for the network")
    compile: Flag = Field(
        description="torch.compile the network: quicker steps on cuda after tens of seconds; needs a C++ compiler"
    )
    window_megabytes: Annotated[Count, Field(ge=1)] = Field(
        description="2**20 bytes of images held on the device; of a larger split, blocks in random order are read and "
        "shuffled together"
    )
    processes: Annotated[Count, Field(ge=1)] = Field(
        description="data-parallel by torchrun, one a GPU or each with cpu_threads; each has its slice of every batch"
    )
    cpu_threads: Annotated[Count, Field(ge=0)] = Field(
        description="threads on the CPU; sums depend on it, so the same number gives the same bits; 0: one a core"
    )
    cpu_kernels: CpuKernels = Field(
        description="portable: PyTorch's AVX2 kernels, with the same bits on every x86-64 CPU that has AVX2, Intel or "
        "AMD; native: all that this CPU has, faster where it has AVX-512. Code that `compile` makes is native"
    )
    deterministic: Flag = Field(description="ask for deterministic kernels; slower on cuda")
    checkpoint_every_minutes: Annotated[Number, Field(gt=0)] = Field(
        description="write a checkpoint this often in a long epoch, and at the end of one if the last is older than "
        "this or than 30 seconds"
    )
    log_every_steps: Annotated[Count, Field(ge=1)] = Field(
        description="steps between two points of the live loss curve"
    )
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = Field(
        description="draws initial weights, order, augmentation and dropout"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and (self.optimizer not in ("sgd", "muon") or self.momentum == 0):
            raise ValueError(
                f"nesterov is true, but optimizer is {self.optimizer} and momentum {self.momentum}; "
                "Nesterov's rule needs optimizer: sgd or muon and a momentum above 0"
            )
        from_file = self.weights not in (None, "DEFAULT")
        if self.weights_md5 is not None and not from_file:
            raise ValueError(f"weights_md5 is set, but weights is {self.weights}; allowed: null, as there is no file")
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}, but processes {self.processes}; allowed: a multiple of it, as each "
                "process has an equal slice of a batch"
            )
        if self.loss == "mse" and self.label_smoothing > 0:
            raise ValueError("label_smoothing is for loss: cross_entropy; set it to 0 for mse")
        return self


class EvaluateParams(Section):
    """How the model is evaluated on the test split."""

    checkpoint: Literal["best", "last"] = Field(
        description="best: the epoch that train.selection keeps; last: the last epoch"
    )
    batch_size: Annotated[Count, Field(ge=1)] = Field(description="images at a time; does not change the result")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: cuda, else mps, else cpu")
    cpu_threads: Annotated[Count, Field(ge=0)] = Field(description="threads on the CPU; 0: one a core")
    cpu_kernels: CpuKernels = Field(description="portable: the same bits on every x86-64 CPU with AVX2; as in train")
    test_time_augmentation: Views = Field(
        description="mean of the logits over views: the image and its mirror image, and these shifted by a pixel"
    )
    top_k: Annotated[Count, Field(ge=2)] = Field(
        description="also report the accuracy among the k most probable classes, where there are more"
    )


class Params(Section):
    """The whole of `params.yaml`: one section a step."""

    download: DownloadParams
    normalize: NormalizeParams
    train: TrainParams
    evaluate: EvaluateParams

    def flat(self) -> dict[str, Any]:
        """`{"train.epochs": 20, …}` to be recorded: addresses without user, password and query."""
        values = {f"{step}.{name}": value for step, section in self for name, value in section}
        return values | {"download.urls": ", ".join(map(redact_url, self.download.urls))}


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check `path`; raises UserError naming the field, what was found and what is allowed."""
    return check_params(read_yaml(path), origin=str(path))


def check_params(values: Mapping[str, Any], *, origin: str, overridden: Collection[str] = ()) -> Params:
    """Check raw values; the UserError names `origin` (a file or a command), or `override` for a field overridden."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, sections=SECTIONS, origin=origin, overridden=overridden)) from None


def compose(recipe: str | None, overrides: Mapping[str, Any]) -> Any:
    """The raw `params.yaml`, with a recipe's values over it and `{"train.epochs": 3}` over both; comments are kept."""
    values = read_yaml(PARAMS_FILE)
    check_params(values, origin=str(PARAMS_FILE))
    for section, fields in ({} if recipe is None else read_yaml(recipe_path(recipe))).items():
        if not isinstance(fields, Mapping):
            raise UserError(
                f"recipe {recipe}: {section} is {describe_value(fields)}; allowed: a section with fields under it"
            )
        for field, value in fields.items():
            _assign(values, f"{section}.{field}", value, origin=f"recipe {recipe}")
    for name, value in overrides.items():
        _assign(values, name, value, origin="override")
    check_params(
        values, origin=f"{PARAMS_FILE} + recipe {recipe}" if recipe else str(PARAMS_FILE), overridden=overrides
    )
    return values


def recipe_path(recipe: str) -> Path:
    """`recipes/<recipe>.yaml`; raises UserError listing the recipes where it is not one."""
    names = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
    if recipe not in names:
        allowed = list_choices(recipe, names) if names else f"none here, since {RECIPES_FOLDER}/ holds no recipe"
        raise UserError(f"recipe: found {recipe!r}; allowed: {allowed}")
    return RECIPES_FOLDER / f"{recipe}.yaml"


def parse_override(text: str) -> tuple[str, Any]:
    """`"train.epochs=3"` → `("train.epochs", 3)`; the value is read as YAML."""
    name, separator, value = text.partition("=")
    if not separator or "." not in name:
        raise UserError(f"--set: found {text!r}; allowed: section.field=value, as in train.epochs=3")
    try:
        return name.strip(), YAML(typ="safe", pure=True).load(value)
    except Exception:  # see read_yaml
        raise UserError(f"--set: the value in {redact_url(text)!r} is not valid YAML") from None


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the values of several `--set` options by parameter; raises UserError where two set the same one."""
    overrides: dict[str, Any] = {}
    for text in texts:
        name, value = parse_override(text)
        if name in overrides:
            raise UserError(f"--set: found {name} twice; allowed: each parameter once; leave one of them out")
        overrides[name] = value
    return overrides


def _assign(values: Any, name: str, value: Any, *, origin: str) -> None:
    section, _, field = name.partition(".")
    if section not in Params.model_fields:
        raise UserError(
            f"{origin}: unknown section {section!r}; allowed: {list_choices(section, list(Params.model_fields))}"
        )
    if field not in values[section]:
        raise UserError(f"{origin}: unknown key {name!r}; allowed: {list_choices(field, list(values[section]))}")
    values[section][field] = value


SECTIONS: Mapping[str, type[Section]] = {
    "download": DownloadParams,
    "normalize": NormalizeParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
}


def main() -> None:
    """Write a recipe and single values into `params.yaml`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.params", description="Write values into params.yaml.")
    parser.add_argument("--recipe", help="a name from recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    arguments = parser.parse_args()
    with report_errors():
        overrides = parse_overrides(arguments.overrides)
        write_text(PARAMS_FILE, dump_yaml(compose(arguments.recipe, overrides)))
        print(f"{PARAMS_FILE} written; `git diff {PARAMS_FILE}` shows what changed, `dvc repro` runs it")


if __name__ == "__main__":
    main()
