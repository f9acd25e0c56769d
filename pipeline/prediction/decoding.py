"""Read the image files of a command line in blocks, on all cores."""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain, islice

from pipeline.core.processes import num_cores
from pipeline.datasets.decoding_pool import decode_in_processes
from pipeline.models.config import ModelConfig
from pipeline.models.inference import IMAGES_PER_CHUNK
from pipeline.prediction.image_files import ReadImage, read_files, read_image
from pipeline.prediction.inputs import Input

BLOCK_IMAGES = 256  # most inputs in a block
BLOCK_BYTES = 2**23  # of the pixels in a block; it has IMAGES_PER_CHUNK images at least, and a multiple of them
MAX_WITHOUT_POOL = 64  # inputs that this process reads alone; starting others takes longer than reading small images


def read_images(inputs: Iterator[Input], *, config: ModelConfig) -> Generator[list[ReadImage], None, None]:
    """Read the inputs in their order, and yield them in blocks of up to BLOCK_IMAGES.

    The pixels have the size and channels of the images that the model with this configuration was trained with. More
    than MAX_WITHOUT_POOL inputs are read in one process for each core. These processes import the main module, which
    should import PyTorch in its `main` only, to save their time and memory. Two blocks more than processes are in
    memory. Raises UserError where such a process dies.
    """
    read_one = partial(read_image, image_size=config.image_size, channels=config.channels, resize=config.resize)
    read = partial(read_files, image_size=config.image_size, channels=config.channels, resize=config.resize)
    first = list(islice(inputs, MAX_WITHOUT_POOL + 1))
    length = block_length(config.image_size * config.image_size * config.channels)
    blocks = _blocks(chain(first, inputs), length=length, read_here=read_one)
    if len(first) <= MAX_WITHOUT_POOL or num_cores() == 1:
        yield from (read(block).images() for block in blocks)
    else:
        found = decode_in_processes(read, blocks, first_name=lambda block: block[0].path)
        yield from (block.images() for block in found)


def block_length(image_bytes: int) -> int:
    """Return the number of inputs in a block, where the pixels of an image have this many bytes.

    It is a power of two, as is the number of rows in a part of an output file: no block is in two parts, so that a GPU
    computes the same batches after a part was kept.
    """
    chunks = min(BLOCK_BYTES // image_bytes, BLOCK_IMAGES) // IMAGES_PER_CHUNK
    return IMAGES_PER_CHUNK << (max(1, chunks).bit_length() - 1)


def _blocks(
    inputs: Iterator[Input], *, length: int, read_here: Callable[[Input], ReadImage]
) -> Iterator[list[Input | ReadImage]]:
    """Yield blocks of inputs, of which those are read that only this process can read."""
    while block := list(islice(inputs, length)):
        yield [read_here(each) if each.here_only else each for each in block]
