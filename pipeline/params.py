"""Read the parameters, `params.yaml` and the recipes, into frozen, typed models; an unknown key is an error.

Run as a program, this module writes a recipe and single values into `params.yaml`, whose comments stay:
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
ALLOWED_LAYOUTS = (
    "<class>/… or <split>/<class>/… with at least two classes, split being train (training), validation (val, valid, "
    "dev) or test (testing, holdout, eval), with words before or after it as in seg_train"
)


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


# a whole number; `3.0`, `"3"` and `true` are refused
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(strict=True)]
# a finite number, or text that is one: YAML reads `1e-3` as text, and only `1.0e-3` as a number
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
# the names of the data sources, which pipeline/datasets/sources.py downloads and reads
Dataset = Literal["digits", "cifar10", "imagefolder"]
Channels = Literal[1, 3]  # gray or RGB
Resize = Literal["crop", "pad", "stretch"]
Views = Literal["none", "mirror", "mirror_and_shift"]
Selection = Literal["highest_accuracy", "latest_equivalent"]
CpuKernels = Literal["portable", "native"]
Flag = Annotated[bool, Field(strict=True)]


def layout_error(found: str, remedy: str) -> UserError:
    """Return the error for a folder in `download.folder` that is missing or whose layout is not allowed."""
    return UserError(f"download.folder: {found}; allowed: {ALLOWED_LAYOUTS}; {remedy}")


def check_is_folder(folder: Path) -> None:
    """Raise UserError where the folder in `download.folder` does not exist or is a file."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise layout_error(f"{str(folder)!r} {problem}", "correct the path")


class Section(BaseModel):
    """A section of `params.yaml`, immutable; a missing key is an error, since no default is hidden in code."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DownloadParams(Section):
    """The parameters of `download`: the data source and where its raw data is."""

    dataset: Dataset = Field(
        description="digits (scikit-learn's, no download), cifar10 (fetched), or imagefolder (your own images)"
    )
    folder: Annotated[str, Field(min_length=1)] = Field(
        description="imagefolder: the folder with <class>/… or <split>/<class>/… (train, validation, test)"
    )
    urls: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = Field(
        description="cifar10: places of the archive, tried in this order: http(s)://, file://, or a path"
    )
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        description="cifar10: MD5 of the archive in hexadecimal, checked before anything in it is read"
    )
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        description="cifar10: try the next place when a server has sent nothing for this long"
    )

    @property
    def origin(self) -> str | None:
        """Return the URL or path of the raw data, without secrets, or None where it comes with a package."""
        match self.dataset:
            case "cifar10":
                return redact_url(self.urls[0])
            case "imagefolder":
                return str(Path(self.folder).resolve())
            case _:
                return None

    @model_validator(mode="after")
    def _refuse_passwords(self) -> Self:
        for url in self.urls:
            if "@" in url.partition("://")[2].partition("/")[0]:
                raise ValueError(
                    f"urls: {redact_url(url)} comes with a user or password, which every run would record; "
                    "allowed: URLs without; put user and password into ~/.netrc"
                )
        return self


class NormalizeParams(Section):
    """The parameters of `normalize`: size and channels of the arrays, and the splits."""

    image_size: Annotated[Count, Field(ge=8, le=1024)] = Field(description="height and width of the arrays in pixels")
    channels: Literal["auto", 1, 3] = Field(description="1 (gray), 3 (RGB), or auto: what the data source has")
    resize: Resize = Field(description="how an image becomes square: crop to its center, pad with black, or stretch")
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
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = Field(description="seed of the random choice of the splits")


class TrainParams(Section):
    """The parameters of `train`: network, loss, optimizer, schedule and device."""

    model: str = Field(
        description="lenet, airbench or another of pipeline/models/build.py, or any of torchvision (resnet18, …)"
    )
    weights: str | None = Field(
        description="null (from scratch), DEFAULT (torchvision's pretrained), or a .safetensors or .pth file of weights"
    )
    weights_md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = Field(
        description="MD5 of the file in weights, in hexadecimal; null where weights names no file"
    )
    input_size: Annotated[Count, Field(ge=16, le=1024)] | None = Field(
        description="height and width in pixels to which images are enlarged on the device; null: not enlarged"
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
        description="the learning rate of the biases of batch normalization is multiplied by it, their weight decay is "
        "divided by it"
    )
    schedule: Literal["constant", "step", "linear", "cosine", "one_cycle"] = Field(
        description="how the learning rate changes from step to step"
    )
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="fraction of all steps over which the learning rate rises to its peak"
    )
    step_epochs: Annotated[Number, Field(gt=0)] = Field(description="step: epochs between two drops")
    step_factor: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="step: the learning rate is multiplied by this at each drop"
    )
    epochs: Annotated[Count, Field(ge=1)] = Field(description="passes over the training split")
    selection: Selection = Field(
        description="rule that selects the epoch of best.safetensors; early stopping uses it too. highest_accuracy: "
        "the highest validation accuracy, then the lower validation loss, then the later epoch. latest_equivalent: "
        "the latest epoch whose validation accuracy is inside the 95 % interval of the highest one, for validation "
        "splits of up to a few hundred images"
    )
    early_stopping_epochs: Annotated[Count, Field(ge=1)] | None = Field(
        description="stop after this many epochs in a row without improvement (with selection: latest_equivalent, that "
        "are worse than an earlier one); null: never"
    )
    batch_size: Annotated[Count, Field(ge=1)] = Field(
        description="images in each step; an incomplete last batch is left out"
    )
    average_every_steps: Annotated[Count, Field(ge=1)] | None = Field(
        description="lookahead: set the weights to their running mean once in this many steps; null: never"
    )
    flip: Flag = Field(
        description="augmentation: mirror each image left to right in every other epoch, half of the images in each"
    )
    crop_padding: Annotated[Count, Field(ge=0)] = Field(
        description="augmentation: shift by up to this many pixels; the gap is filled by reflection"
    )
    cutout_size: Annotated[Count, Field(ge=0)] = Field(
        description="augmentation: blank a square with sides of this many pixels"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: cuda, else mps, else cpu")
    mixed_precision: Literal["none", "bfloat16", "float16"] = Field(description="on cuda; elsewhere float32 is used")
    channels_last: Flag = Field(description="memory layout NHWC for the network")
    compile: Flag = Field(
        description="torch.compile the network: quicker steps on cuda after tens of seconds; needs a C++ compiler"
    )
    window_megabytes: Annotated[Count, Field(ge=1)] = Field(
        description="limit for the images on the device, in 2**20 bytes; a larger split is read in blocks in random "
        "order, and those that are on the device together are shuffled together"
    )
    processes: Annotated[Count, Field(ge=1)] = Field(
        description="number of data-parallel processes (torchrun), one for each GPU, or each with cpu_threads on the "
        "CPU; each trains on a slice of every batch"
    )
    cpu_threads: Annotated[Count, Field(ge=0)] = Field(
        description="threads on the CPU; rounding depends on their number, so that only the same number gives the same "
        "bits; 0: one for each core"
    )
    cpu_kernels: CpuKernels = Field(
        description="portable: PyTorch's AVX2 kernels, with the same bits on every x86-64 CPU that has AVX2, Intel or "
        "AMD; native: the fastest kernels for this CPU, faster where it has AVX-512. Code that `compile` generates is "
        "native"
    )
    deterministic: Flag = Field(description="use deterministic kernels where PyTorch has them; slower on cuda")
    checkpoint_every_minutes: Annotated[Number, Field(gt=0)] = Field(
        description="write a checkpoint this often during an epoch, and at its end if the last one is older than this "
        "or than 30 seconds"
    )
    log_every_steps: Annotated[Count, Field(ge=1)] = Field(
        description="steps between two points of the live loss curve"
    )
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = Field(
        description="seed of the initial weights, the order of images, augmentation and dropout"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.nesterov and (self.optimizer not in ("sgd", "muon") or self.momentum == 0):
            raise ValueError(
                f"nesterov is true, but train.optimizer is {self.optimizer} and train.momentum {self.momentum}; "
                "allowed: true with optimizer sgd or muon and momentum above 0; set train.nesterov to false, or "
                "change these"
            )
        from_file = self.weights not in (None, "DEFAULT")
        if self.weights_md5 is not None and not from_file:
            raise ValueError(
                f"weights_md5 is set, but weights is {self.weights or 'null'}, which is not a file; allowed: null; set "
                "weights_md5 to null"
            )
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}, but processes {self.processes}; allowed: a multiple of processes, "
                "as each process has an equal slice of a batch; change one of them"
            )
        if self.loss == "mse" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but loss is mse; allowed: 0, as it is for cross_entropy; "
                "set it to 0, or change the loss"
            )
        return self


class EvaluateParams(Section):
    """The parameters of `evaluate`, which reads the test split."""

    checkpoint: Literal["best", "last"] = Field(
        description="best: the epoch that train.selection selects; last: the last epoch"
    )
    batch_size: Annotated[Count, Field(ge=1)] = Field(description="images at a time; does not change the result")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="auto: cuda, else mps, else cpu")
    cpu_threads: Annotated[Count, Field(ge=0)] = Field(description="threads on the CPU; 0: one for each core")
    cpu_kernels: CpuKernels = Field(description="portable: the same bits on every x86-64 CPU with AVX2; as in train")
    test_time_augmentation: Views = Field(
        description="average the logits over views. mirror: the image and its mirror image; mirror_and_shift: also "
        "both shifted by a pixel"
    )
    top_k: Annotated[Count, Field(ge=2)] = Field(
        description="also report the fraction of images whose class is among the k most probable ones; left out where "
        "there are no more than k classes"
    )


class Params(Section):
    """The content of `params.yaml`: one section for each step."""

    download: DownloadParams
    normalize: NormalizeParams
    train: TrainParams
    evaluate: EvaluateParams

    def flat(self) -> dict[str, Any]:
        """Return the parameters as `{"train.epochs": 20, …}` for the records, with URLs redacted."""
        values = {f"{step}.{name}": value for step, section in self for name, value in section}
        return values | {"download.urls": ", ".join(map(redact_url, self.download.urls))}


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check a params file; raises UserError naming the field, what was found and what is allowed."""
    return check_params(read_yaml(path), origin=str(path))


def check_params(values: Mapping[str, Any], *, origin: str, overridden: Collection[str] = ()) -> Params:
    """Check raw values and return them as typed parameters.

    The UserError for a bad value names `origin`, such as a file, or `--set` for a field in `overridden`.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, sections=SECTIONS, origin=origin, overridden=overridden)) from None


def compose(recipe: str | None, overrides: Mapping[str, Any]) -> Any:
    """Return the values of `params.yaml`, replaced by those of a recipe and then by overrides; comments stay.

    `overrides` has dotted names, as in `{"train.epochs": 3}`. Raises UserError for a bad name or value.
    """
    values = read_yaml(PARAMS_FILE)
    check_params(values, origin=str(PARAMS_FILE))
    path = None if recipe is None else recipe_path(recipe)
    for section, fields in ({} if path is None else read_yaml(path)).items():
        if not isinstance(fields, Mapping):
            raise UserError(f"{path}: {section} is {describe_value(fields)}; allowed: a section with fields under it")
        for field, value in fields.items():
            _assign(values, f"{section}.{field}", value, origin=str(path))
    for name, value in overrides.items():
        _assign(values, name, value, origin="--set")
    origins = [str(PARAMS_FILE), *([str(path)] if path else []), *(["--set"] if overrides else [])]
    check_params(values, origin=" with ".join(origins), overridden=overrides)
    return values


def recipe_path(recipe: str) -> Path:
    """Return `recipes/<recipe>.yaml`; raises UserError with the names of all recipes where there is no such file."""
    names = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
    if recipe not in names:
        allowed = list_choices(recipe, names) if names else f"none, since {RECIPES_FOLDER}/ has no recipe"
        raise UserError(f"--recipe: found {recipe!r}; allowed: {allowed}")
    return RECIPES_FOLDER / f"{recipe}.yaml"


def parse_override(text: str) -> tuple[str, Any]:
    """Return name and value of an override: `("train.epochs", 3)` for `"train.epochs=3"`; the value is YAML.

    Raises UserError where the text is not of this form.
    """
    name, separator, value = text.partition("=")
    if not separator or "." not in name:
        raise UserError(f"--set: found {text!r}; allowed: section.field=value, as in train.epochs=3; correct it")
    try:
        return name.strip(), YAML(typ="safe", pure=True).load(value)
    except Exception:  # ruamel raises nearly anything: see read_yaml
        raise UserError(
            f"--set: the value in {redact_url(text)!r} is not valid YAML; allowed: a number, true, false, null, text "
            "or [a list]; put text with special characters into double quotes"
        ) from None


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
    """Set the value with the dotted name; raises UserError, naming `origin`, where the name is unknown."""
    section, _, field = name.partition(".")
    if section not in SECTIONS:
        raise UserError(f"{origin}: unknown section {section!r}; allowed: {list_choices(section, list(SECTIONS))}")
    if field not in values[section]:
        raise UserError(f"{origin}: unknown key {name!r}; allowed: {list_choices(field, list(values[section]))}")
    values[section][field] = value


SECTIONS: Mapping[str, type[Section]] = Params.__annotations__


def main() -> None:
    """Write a recipe and single values into `params.yaml`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.params", description="Write values into params.yaml.")
    parser.add_argument("--recipe", help="a name from recipes/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="set one value, as in train.epochs=3; may be repeated",
    )
    arguments = parser.parse_args()
    with report_errors():
        overrides = parse_overrides(arguments.overrides)
        write_text(PARAMS_FILE, dump_yaml(compose(arguments.recipe, overrides)))
        print(f"{PARAMS_FILE} written; `git diff {PARAMS_FILE}` shows what changed, `dvc repro` runs the pipeline")


if __name__ == "__main__":
    main()
