"""The training loop: train a network on one split, validate it on another, return its weights and the history.

What is not the algorithm itself is in other modules: `state` (what changes from step to step), `saving` (when a
checkpoint is written), `non_finite` (losses that are not finite), `distributed` (training in several processes) and
`selection` (which epoch is selected, and when the training ends).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.arrays import Split
from pipeline.core.progress import progress
from pipeline.evaluation.scores import f1_scores
from pipeline.models.build import Classifier
from pipeline.models.inference import logits_of
from pipeline.models.losses import balanced_class_weights, count_correct, loss_function
from pipeline.params import TrainParams
from pipeline.training import distributed
from pipeline.training.batches import epoch_batches, seed_dropout_of_rank
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.device import autocast
from pipeline.training.non_finite import NonFiniteGuard, check_validation_loss
from pipeline.training.optimizer import set_learning_rate
from pipeline.training.saving import CheckpointSaver
from pipeline.training.schedule import learning_rate
from pipeline.training.selection import SelectedEpoch, is_finished, select_epoch
from pipeline.training.state import Epoch, TrainingState, Validation, copy_weights

# by the largest height of the network's input in pixels; EfficientNet-Lite0 needs 13 MB for an image of 224 pixels
VALIDATION_BATCH_SIZES = {64: 500, math.inf: 64}


@dataclass(frozen=True)
class TrainingResult:
    """What a training returns; `best` are the weights after the selected epoch, `last` those after the last one."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    history: list[Epoch]
    selected: SelectedEpoch


OnStep = Callable[[int, float, float], None]  # gets the step (from 1), its loss and its learning rate
OnEpoch = Callable[[Epoch, float], None]  # gets the finished epoch and its speed in images per second
Save = Callable[[Checkpoint], None]  # gets all that is needed to resume


def train(  # noqa: C901, PLR0915  # the whole algorithm on one page
    classifier: nn.Module,
    *,
    params: TrainParams,
    train_split: Split,
    validation_split: Split,
    on_step: OnStep = lambda step, loss, rate: None,
    on_epoch: OnEpoch = lambda epoch, images_per_second: None,
    start: Checkpoint | None = None,
    save: Save = lambda checkpoint: None,
) -> TrainingResult:
    """Train `classifier` in place and return its weights; it and the splits must be on one device.

    Where the splits hold features instead of images, `classifier` is the head of a network, without the rest. With
    `params.ema_decay`, the returned weights are averaged ones, which are those that are validated.

    A training that resumes from the checkpoint `start` ends with the same weights as one without a stop. `on_step` is
    called every `params.log_every_steps` steps, `on_epoch` after each validation. `save` is called every
    `params.checkpoint_every_minutes`, after an epoch if the last call was 30 seconds ago, and on SIGTERM and Ctrl-C.
    Raises UserError where a loss is not finite, before the step that would make the weights non-finite.
    """
    if params.compile:
        classifier.compile()
    network = distributed.average_gradients(classifier)
    criterion = training_loss(params, train_split)
    steps_per_epoch, num_validation = len(train_split) // params.batch_size, len(validation_split)
    # a head is trained on features, which are never mixed
    num_classes = classifier.num_classes if isinstance(classifier, Classifier) else None
    state = TrainingState(classifier, params=params)
    if start is not None:
        state.restore(start)
    guard = NonFiniteGuard(state, params=params, steps_per_epoch=steps_per_epoch)
    with CheckpointSaver(state, guard=guard, save=save, every_minutes=params.checkpoint_every_minutes) as saver:
        while not is_finished(state.history, params=params, num_images=num_validation):
            epoch = len(state.history) + 1
            if state.position == 0:
                state.begin_epoch()
            classifier.train()
            batches = epoch_batches(
                train_split, params=params, epoch=epoch, num_classes=num_classes, position=state.position
            )
            title, done = f"epoch {epoch}", state.position
            with progress(title, total=len(batches), done=done, unit="steps", leave=False) as advance:
                for images, labels in batches:
                    with saver.whole_step():
                        # set the learning rate of this step
                        state.learning_rate = learning_rate(state.step, steps_per_epoch=steps_per_epoch, params=params)
                        set_learning_rate(state.optimizers, state.learning_rate)
                        # forward pass
                        seed_dropout_of_rank(params.seed, epoch=epoch, step=state.step)
                        with autocast(params.mixed_precision, device=state.device):
                            logits = network(images)
                        loss = criterion(logits.float(), labels)
                        # add to the sums of the epoch, over the images of all ranks
                        batch_loss_sum = distributed.sum_over_ranks(loss.detach() * len(labels))
                        state.loss_sum += batch_loss_sum
                        state.num_correct += distributed.sum_over_ranks(count_correct(logits.detach(), labels))
                        # stop at a non-finite loss: raise here or, on a GPU, disable the update below
                        loss = guard.watch(loss, mean_over_ranks=batch_loss_sum / params.batch_size)
                        # backward pass
                        classifier.zero_grad(set_to_none=True)
                        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                        # clip the gradient
                        if params.gradient_clip_norm is not None:
                            for optimizer in state.optimizers:
                                state.scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(classifier.parameters(), params.gradient_clip_norm)
                        # update the weights
                        for optimizer in state.optimizers:
                            state.scaler.step(optimizer)
                        state.scaler.update()
                        state.step, state.position = state.step + 1, state.position + 1
                        if state.lookahead:  # with train.average_every_steps
                            state.lookahead.step(state.step, total=params.epochs * steps_per_epoch)
                        if state.ema:  # with train.ema_decay
                            state.ema.step(state.step)
                        # log the loss and the learning rate
                        if state.step % params.log_every_steps == 0:
                            guard.raise_if_non_finite()
                            on_step(state.step, guard.loss.item(), state.learning_rate)
                    advance(1)
                    # write a checkpoint within a long epoch
                    saver.save_if_due()
            # validate after the epoch
            guard.raise_if_non_finite()
            num_train_images = len(batches) * params.batch_size
            images_per_second = num_train_images / (time.perf_counter() - state.epoch_start)
            distributed.broadcast_buffers(state.averaged)
            with autocast(params.mixed_precision, device=state.device):
                validation = validate(state.averaged, validation_split, loss=params.loss)
            check_validation_loss(validation.loss, epoch=epoch, params=params)
            # keep the weights if this epoch is the selected one so far
            with saver.whole_step():
                state.finish_epoch(validation, num_train_images=num_train_images)
                selected = select_epoch(state.history, params=params, num_images=num_validation)
                if selected.epoch == epoch:
                    state.best = copy_weights(state.averaged)
                on_epoch(state.history[-1], images_per_second)
            # write a checkpoint after the epoch
            saver.save_after_epoch()
    selected = select_epoch(state.history, params=params, num_images=num_validation)
    return TrainingResult(state.best, copy_weights(state.averaged), state.history, selected)


def training_loss(params: TrainParams, train_split: Split) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function that the training minimizes, with label smoothing and the weights of the classes."""
    weights = balanced_class_weights(train_split.labels) if params.class_weights == "balanced" else None
    return loss_function(params.loss, label_smoothing=params.label_smoothing, class_weights=weights)


def validation_batch_size(classifier: nn.Module, split: Split) -> int:
    """Return how many images of a split are validated at a time, by the size of the network's input."""
    input_size = classifier.input_size if isinstance(classifier, Classifier) else None
    size = input_size or split.images.shape[1]
    return next(number for limit, number in VALIDATION_BATCH_SIZES.items() if size <= limit)


def validate_before_training(classifier: nn.Module, split: Split, *, params: TrainParams) -> Validation:
    """Return the validation of a network that is not trained yet; call it before `train`, in all processes.

    It changes neither weights and buffers nor random states. `train` compiles the network only afterwards, so that the
    first batch that is compiled is the same as without this call.
    """
    with autocast(params.mixed_precision, device=next(classifier.parameters()).device):
        return validate(classifier, split, loss=params.loss)


def validate(classifier: nn.Module, split: Split, *, loss: str) -> Validation:
    """Return loss, accuracy and macro F1 of a whole split; the loss is without label smoothing and class weights.

    With several processes, each computes its slice of the split, and all return the same values.
    """
    rank, num_ranks = distributed.rank(), distributed.world_size()
    start, stop = len(split) * rank // num_ranks, len(split) * (rank + 1) // num_ranks
    logits = logits_of(classifier, split, batch_size=validation_batch_size(classifier, split), between=(start, stop))
    labels = split.labels[start:stop]
    loss_sum = loss_function(loss)(logits, labels).item() * (stop - start)
    actual, predicted = labels.cpu(), logits.argmax(1).cpu()
    counts = [found.bincount(minlength=logits.shape[1]) for found in (actual[actual == predicted], actual, predicted)]
    sums = torch.cat([torch.tensor([loss_sum], dtype=torch.float64), *counts])
    sums = distributed.sum_over_ranks(sums.cuda() if logits.is_cuda else sums).cpu()
    num_correct, num_actual, num_predicted = sums[1:].view(3, -1).long().numpy()
    f1 = f1_scores(num_correct=num_correct, actual=num_actual, predicted=num_predicted)
    return Validation(sums[0].item() / len(split), num_correct.sum().item() / len(split), f1.mean().item())
