"""Read the parameters in `params.yaml` into frozen, typed models; a missing key is an error, and an unknown one."""

import runpy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import UserError, redact_url
from pipeline.core.validation import explain
from pipeline.core.yaml import read_yaml

PARAMS_FILE = Path("params.yaml")
RECIPES_FOLDER = Path("recipes")


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
Selection = Literal["best", "latest_equivalent"]
Sampler = Literal["shuffle", "balanced"]
Metric = Literal["accuracy", "macro_f1", "loss"]
AutoAugment = Literal["none", "rand_augment", "trivial_augment"]
CpuKernels = Literal["portable", "native"]
Flag = Annotated[bool, Field(strict=True)]


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
    labels: Annotated[str, Field(min_length=1)] = Field(
        description="imagefolder: where the labels are. folders: the names of the class folders; a path in the folder "
        "such as labels.csv: a table with the columns image, label and, if wanted, split and group; auto: labels.csv "
        "if the folder has it, else folders"
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
        description="expected fraction of train used for validation (where the source has no validation split)"
    )
    test_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        description="expected fraction of all images used for test (where the source has no test split)"
    )
    max_unreadable_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="stop if more than this fraction of the files cannot be read"
    )
    near_duplicate_correlation: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="two images that correlate at least this much are near-duplicates, which are put into the same "
        "split when splits are drawn; the right value depends on the images (0.9 for photographs, 0.98 for digits)"
    )
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = Field(description="seed of the random choice of the splits")


class TrainParams(Section):
    """The parameters of `train`: network, loss, optimizer, schedule and device."""

    model: str = Field(
        description="lenet, airbench or another of pipeline/models/build.py, any of torchvision (resnet18, …), or "
        "timm/<name> for any of timm (timm/tf_efficientnet_lite0, …)"
    )
    weights: str | None = Field(
        description="null (from scratch), DEFAULT (the network's pretrained ones), or a .safetensors or .pth file"
    )
    weights_md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = Field(
        description="MD5 of the file in weights, or of that which DEFAULT downloads for a network of timm; else null"
    )
    input_size: Annotated[Count, Field(ge=16, le=1024)] | None = Field(
        description="height and width in pixels to which the device resizes images and, with pretrained weights, crops "
        "them as the weights expect; null, or equal to image_size: unchanged"
    )
    freeze: Annotated[str, Field(pattern=r"^(none|backbone|until=[\w.]+)$")] = Field(
        description="which part of a pretrained network is not trained: none; backbone: all but the last layer; "
        "until=<block>: all blocks up to and including this one, as in until=layer3"
    )
    loss: Literal["cross_entropy", "mse"] = Field(description="mse compares the outputs with one-hot targets")
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = Field(description="for cross_entropy")
    class_weights: Literal["none", "balanced"] = Field(
        description="weight of an image in the loss. none: 1; balanced: all images / (classes * images of its class)"
    )
    sampler: Sampler = Field(
        description="shuffle: each image once an epoch; balanced: images are drawn with replacement, each class "
        "equally often if the split fits into window_megabytes"
    )
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
    head_learning_rate_factor: Annotated[Number, Field(gt=0)] = Field(
        description="the learning rate of the last layer is multiplied by it"
    )
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="the learning rate of each block is that of the next one, nearer to the output, times this"
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
    select_by: Metric = Field(
        description="what epochs are compared by on the validation split: accuracy, macro_f1 (the mean F1 of the "
        "classes, for unequal ones) or loss"
    )
    selection: Selection = Field(
        description="rule that selects the epoch of best.safetensors; early stopping uses it too. best: the best "
        "select_by, then the lower validation loss, then the later epoch. latest_equivalent: the latest epoch whose "
        "validation accuracy is inside the 95 % interval of the highest one, for validation splits of up to a few "
        "hundred images; with select_by: accuracy"
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
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        description="validate and save the exponential moving average of the weights, of which each step keeps this "
        "fraction; null: no average"
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
    random_resized_crop: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        description="augmentation: cut out a random part, of at least this fraction of the image's area; null: never"
    )
    color_jitter: Annotated[Number, Field(ge=0, le=1)] = Field(
        description="augmentation: change brightness, contrast and saturation by up to this fraction, hue by a quarter "
        "of it"
    )
    auto_augment: AutoAugment = Field(description="augmentation by one of torchvision's policies")
    random_erasing: Annotated[Number, Field(ge=0, le=1)] = Field(
        description="augmentation: probability that a random rectangle is blanked"
    )
    mixup_alpha: Annotated[Number, Field(ge=0)] = Field(
        description="augmentation: mix pairs of images and their labels, with a Beta(alpha, alpha) weight; 0: never"
    )
    cutmix_alpha: Annotated[Number, Field(ge=0)] = Field(
        description="augmentation: paste a part of another image, with that share of its label; 0: never; with "
        "mixup_alpha too, each batch gets one of both"
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
        is_checked_elsewhere = self.weights == "DEFAULT" and not self.model.startswith("timm/")
        if self.weights_md5 is not None and (self.weights is None or is_checked_elsewhere):
            raise ValueError(
                f"weights_md5 is set, but weights is {self.weights or 'null'}, which is not a file; allowed: null; set "
                "weights_md5 to null"
            )
        if self.freeze != "none" and self.weights is None:
            raise ValueError(
                f"freeze is {self.freeze}, but weights is null: random weights would never be trained; allowed: none; "
                "set freeze to none, or weights to DEFAULT or a file"
            )
        if self.class_weights == self.sampler == "balanced":
            raise ValueError(
                "sampler is balanced, and so is class_weights: rare classes would be weighted twice; allowed: one of "
                "both; set sampler to shuffle, or class_weights to none"
            )
        if self.selection == "latest_equivalent" and self.select_by != "accuracy":
            raise ValueError(
                f"selection is latest_equivalent, but select_by {self.select_by}, which has no such interval; allowed: "
                "best; set selection to best, or select_by to accuracy"
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


class PromoteParams(Section):
    """The policy by which a model becomes the champion; no stage depends on it, and no run can override it."""

    false_promotion_budget: Annotated[Number, Field(gt=0, le=0.5)] = Field(
        description="highest probability that a model that is no better is promoted, over the life of a test split"
    )
    max_looks: Annotated[Count, Field(ge=1, le=100_000)] = Field(
        description="how often challengers may be compared on one test split, each time at the level look_level"
    )
    validation_level: Annotated[Number, Field(gt=0, le=0.5)] = Field(
        description="level of the one-sided test on the validation split that a challenger must pass before a look"
    )
    minimum_gain: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="smallest gain of accuracy on the test split that replaces the champion"
    )
    max_leaked_fraction: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="largest fraction of the test images with a near-duplicate in the challenger's training data"
    )
    max_calibration_error: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        description="largest expected calibration error on the test split; null: any"
    )
    max_class_recall_loss: Annotated[Number, Field(ge=0, le=1)] = Field(
        description="largest loss of recall of a class, among the classes in which the challenger is shown to be worse"
    )
    max_megabytes: Annotated[Number, Field(gt=0)] | None = Field(
        description="largest file of weights in 10**6 bytes; null: any"
    )
    max_latency_milliseconds: Annotated[Number, Field(gt=0)] | None = Field(
        description="longest time for the prediction of one image; a model whose time is unknown is then refused; "
        "null: any, also an unknown one"
    )

    @property
    def look_level(self) -> float:
        """Return the level of the one-sided test of each look at a test split (Bonferroni's correction)."""
        return self.false_promotion_budget / self.max_looks


class Params(Section):
    """The content of `params.yaml`: one section for each step, and the policy of promotion."""

    download: DownloadParams
    normalize: NormalizeParams
    train: TrainParams
    evaluate: EvaluateParams
    promote: PromoteParams

    def flat(self) -> dict[str, Any]:
        """Return the parameters of the steps as `{"train.epochs": 20, …}` for the records, with URLs redacted."""
        values = {f"{step}.{name}": value for step, section in self if step in STEPS for name, value in section}
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


SECTIONS: Mapping[str, type[Section]] = Params.__annotations__
POLICY = "promote"  # the section that belongs to the checkout, and to no run
STEPS = {name: section for name, section in SECTIONS.items() if name != POLICY}


if __name__ == "__main__":  # the former name of the command, which scripts of users have
    runpy.run_module("pipeline.recipes", run_name="__main__")
