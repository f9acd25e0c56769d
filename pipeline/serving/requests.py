"""Read images and options from a request, and refuse in one line what is wrong with it.

The body is an image file, a form with image files (multipart/form-data), or JSON: `{"images": [base64 of a file, …]}`
or `{"inputs": [image, …]}` with images (H, W, C) of whole numbers from 0 to 255 as the model has them; "instances"
means the same as "inputs", and "params" may have what the query may have. The bytes of the body decide which of these
it is, not its Content-Type, but for a form.
"""

import base64
import binascii
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.datastructures import QueryParams

from pipeline.artifacts import Images
from pipeline.core.errors import escape_control_chars, first_line, shorten
from pipeline.images.decode import TooManyPixels, UnreadableImage, decode
from pipeline.models.config import ModelConfig
from pipeline.serving.limits import MAX_PIXELS, QUICK_PIXELS, RequestError
from pipeline.tracking.served_model import InvalidImages, as_images

DEFAULT_TOP = 3
BLOCK_IMAGES = 32  # decoded and classified together; more would take memory and no less time
ARRAY_FIELDS = ("inputs", "instances")
MAX_NAME_LENGTH = 100  # of what a message quotes from a request
QUICK_JSON_BYTES = 4_000_000  # nested lists take 20 times as much memory as their JSON
# The first bytes of formats whose header may state fewer pixels than are decoded: ICO, ICNS, BLP and IPTC have another
# image file in them, which Pillow even decodes when it reads the header of ICO; TIFF has tiles of any size.
NESTED_FORMATS = (b"\0\0\1\0", b"icns", b"BLP", b"\x1c", b"II", b"MM")
# held by the thread that decodes an image of more than QUICK_PIXELS, or of NESTED_FORMATS, or reads JSON of more than
# QUICK_JSON_BYTES
_large_input_lock = threading.Lock()


@dataclass(frozen=True)
class Options:
    """What a request asks for: the number of classes of each image, and the coverage, None where it states none."""

    top: int
    coverage: float | None


@dataclass(frozen=True)
class Photograph:
    """An image file in a request; `location` is where the request has it, for messages."""

    location: str
    content: bytes


def read_options(query: QueryParams, params: Mapping[str, Any] | None = None) -> Options:
    """Return the options in the query of an address and in the "params" of a JSON body.

    Raises RequestError for an unknown or repeated parameter, and for a value that is not allowed.
    """
    of_body = [(name, str(value)) for name, value in (params or {}).items() if value is not None]
    query = QueryParams([*query.multi_items(), *of_body])
    for name in query:
        if name not in ("top", "coverage"):
            raise RequestError(400, f"found the parameter {_quote(name)}; allowed: top, coverage")
        if len(query.getlist(name)) > 1:
            raise RequestError(400, f"the parameter {name} is there {len(query.getlist(name))} times; allowed: 1")
    top = query.get("top", str(DEFAULT_TOP))
    if not (top.isascii() and top.isdigit() and 1 <= len(top) <= 9 and int(top)):
        raise RequestError(400, f"top is {_quote(top)}; allowed: a whole number, 1 or more")
    try:
        return Options(int(top), float(query["coverage"]) if "coverage" in query else None)
    except ValueError:
        raise RequestError(400, f"coverage is {_quote(query['coverage'])}; allowed: a number such as 0.95") from None


def read_threshold(coverage: float | None, *, default: float | None, config: ModelConfig) -> float | None:
    """Return the threshold of the model for the coverage of a request, else for the default, or None without both.

    The model must have a threshold for the default. Raises RequestError where it has none for that of the request.
    """
    if coverage is None:
        return None if default is None else config.threshold(default)
    try:
        return config.threshold(coverage)
    except ValueError as error:
        raise RequestError(400, str(error)) from None


def read_body(
    body: bytes, *, content_type: str, config: ModelConfig, max_images: int
) -> tuple[list[Photograph] | Images, dict[str, Any]]:
    """Return the image files or the arrays (N, H, W, C) uint8 of a request, and its "params", which only JSON has.

    Raises RequestError.
    """
    if not body:
        raise RequestError(400, "the body is empty; send an image file, as by `curl --data-binary @FILE`")
    media_type, parameters = parse_options_header(content_type)
    if media_type == b"multipart/form-data":
        return _photographs_of_form(body, boundary=parameters.get(b"boundary", b""), max_images=max_images), {}
    if media_type.endswith(b"json") or body.lstrip()[:1] in (b"{", b"["):
        with _large_input_lock if len(body) > QUICK_JSON_BYTES else nullcontext():
            return _read_json(body, config=config, max_images=max_images)
    return [Photograph("the body", body)], {}


def image_blocks(found: list[Photograph] | Images, *, config: ModelConfig) -> Iterator[Images]:
    """Yield images in their order, in blocks (N, H, W, C) uint8 of up to BLOCK_IMAGES; raises RequestError."""
    for start in range(0, len(found), BLOCK_IMAGES):
        block = found[start : start + BLOCK_IMAGES]
        yield block if isinstance(block, np.ndarray) else np.stack([_decode(each, config=config) for each in block])


def _photographs_of_form(body: bytes, *, boundary: bytes, max_images: int) -> list[Photograph]:
    """Return the files of a form."""
    files = list[tuple[str, bytes]]()

    def add(file: File) -> None:
        _check_count(len(files) + 1, max_images=max_images)
        file.file_object.seek(0)
        files.append((_text(file.field_name), file.file_object.read()))

    def refuse(field: Field) -> None:
        name = _text(field.field_name)
        raise RequestError(400, f"field {_quote(name)} is text, not a file; send one, as by `curl -F image=@FILE`")

    if not boundary:
        raise RequestError(400, "Content-Type is multipart/form-data without a boundary; `curl -F` adds one")
    try:
        # files stay in memory, as the body does
        parser = FormParser(
            "multipart/form-data", refuse, add, boundary=boundary, config={"MAX_MEMORY_FILE_SIZE": len(body)}
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise RequestError(400, f"the form is damaged: {shorten(first_line(error), MAX_NAME_LENGTH)}") from None
    if not files:
        raise RequestError(400, "the form has no file, or is incomplete; send one, as by `curl -F image=@FILE`")
    return _located(files)


def _located(files: list[tuple[str, bytes]]) -> list[Photograph]:
    """Return the files of a form; those of one field are numbered where it has several, as in `image[1]`."""
    total, seen = Counter(field for field, _ in files), Counter[str]()
    photographs = []
    for field, content in files:
        name = f"{field}[{seen[field]}]" if total[field] > 1 else field
        seen[field] += 1
        photographs.append(Photograph(f"field {_quote(name)}", content))
    return photographs


def _read_json(
    body: bytes, *, config: ModelConfig, max_images: int
) -> tuple[list[Photograph] | Images, dict[str, Any]]:
    """Return the files or the arrays of the JSON object, and its "params"."""
    fields = _fields_of_json(body)
    params = fields.pop("params", None) or {}
    if not isinstance(params, dict):
        raise RequestError(400, f'params: found {_describe(params)}; allowed: an object such as {{"coverage": 0.95}}')
    [(field, value)] = fields.items()
    if field in ARRAY_FIELDS:
        return _images_of_array(value, config=config, max_images=max_images), params
    return _photographs_of_json(value, max_images=max_images), params


def _fields_of_json(body: bytes) -> dict[str, Any]:
    """Return the fields of the JSON object: one has the images, and there may be "params", as MLflow has them."""
    allowed = 'allowed: {"images": ["<base64>", …]} or {"inputs": [<image>, …]}'
    try:
        value = json.loads(body)
    except RecursionError:
        raise RequestError(400, f"the body is JSON with too many nested lists; {allowed}") from None
    except ValueError as error:
        raise RequestError(
            400, f"the body is no valid JSON: {shorten(first_line(error), MAX_NAME_LENGTH)}; {allowed}"
        ) from None
    if not isinstance(value, dict):
        raise RequestError(400, f"the body is JSON with {_describe(value)} instead of an object; {allowed}")
    others = value.keys() - {"params"}
    if len(others) != 1 or not others <= {"images", *ARRAY_FIELDS}:
        names = shorten(", ".join(map(_quote, value)), MAX_NAME_LENGTH) or "no field"
        raise RequestError(400, f"the body is JSON with {names}; {allowed}")
    return value


def _photographs_of_json(value: Any, *, max_images: int) -> list[Photograph]:
    """Return the files whose base64 a list has."""
    if not isinstance(value, list):
        raise RequestError(400, f"images: found {_describe(value)}; allowed: a list of image files in base64")
    if not value:
        raise RequestError(400, "images: found an empty list; allowed: 1 or more image files in base64")
    _check_count(len(value), max_images=max_images)
    return [Photograph(f"images[{index}]", _from_base64(text, index=index)) for index, text in enumerate(value)]


def _from_base64(text: Any, *, index: int) -> bytes:
    """Return the bytes that a text encodes; white space in it, as `base64` writes, is ignored."""
    if not isinstance(text, str):
        raise RequestError(400, f"images[{index}]: found {_describe(text)}; allowed: an image file in base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise RequestError(400, f"images[{index}]: no valid base64: {first_line(error)}") from None


def _images_of_array(value: Any, *, config: ModelConfig, max_images: int) -> Images:
    """Return nested lists of numbers as images (N, H, W, C) uint8."""
    size = config.image_size
    try:
        images = as_images(value, shape=(size, size, config.channels))
    except InvalidImages as error:
        raise RequestError(400, shorten(first_line(error.message), 5 * MAX_NAME_LENGTH)) from None
    _check_count(len(images), max_images=max_images)
    return images


def _decode(photograph: Photograph, *, config: ModelConfig) -> npt.NDArray[np.uint8]:
    """Return the image as `normalize` would store it, (H, W, C) uint8."""
    read = partial(
        decode,
        photograph.content,
        image_size=config.image_size,
        channels=config.channels,
        resize=config.resize,
    )
    try:
        if not photograph.content.startswith(NESTED_FORMATS):
            with suppress(TooManyPixels):
                return read(max_pixels=QUICK_PIXELS)
        with _large_input_lock:
            return read(max_pixels=MAX_PIXELS)
    except TooManyPixels:
        found = (
            f"{photograph.location} is not readable as an image (more than {MAX_PIXELS:,} pixels); send a smaller one"
        )
        raise RequestError(400, found) from None
    except UnreadableImage as error:
        hint = "; `curl --data-binary @FILE` sends a file unchanged" if photograph.location == "the body" else ""
        raise RequestError(400, f"{photograph.location} is not readable as an image ({error}){hint}") from None


def _check_count(number: int, *, max_images: int) -> None:
    if number > max_images:
        raise RequestError(413, f"the request has more than {max_images:,} images; allowed: {max_images:,}; send fewer")


def _describe(value: Any) -> str:
    """Return what a JSON value is, for a message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _quote(text: str) -> str:
    return f'"{shorten(escape_control_chars(text), MAX_NAME_LENGTH)}"'


def _text(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")
