"""The form of ``POST /v1/images/edits``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fewstep.errors import UserError
from fewstep.inference.edit_input import EditInput, open_image, read_edit_input
from fewstep.inference.instruction import check_count
from fewstep.models.editor import EditingFamily
from fewstep.serve.schema import EditRequest, describe_errors

MAX_UPLOAD_PIXELS = 2**24  # of an image that a client sends, before it is resized

_FILE = {"type": "string", "format": "binary"}


def edit_schema() -> dict[str, Any]:
    """OpenAPI's description of the form."""
    schema = EditRequest.model_json_schema()
    schema["properties"] |= {"image": _FILE, "mask": _FILE}
    schema["required"] = [*schema["required"], "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def read_edit(http: Request, check: Callable[[EditRequest], object]) -> tuple[EditRequest, EditInput]:
    """The fields and files of a form.

    Args:
        check: refuses fields beyond the server's limits, before an image is resized to them.

    Raises:
        UserError: it is no such form, or a field or file is wrong.
    """
    uploaded, body = await _read_form(http, 2)
    files = dict(uploaded)
    if len(files) < len(uploaded):
        raise UserError("a field is there twice; one image and one mask are taken")
    if unknown := set(files) - {"image", "mask"}:
        raise UserError(f"{min(unknown)}: there is no such file; there are image and mask")
    if "image" not in files:
        raise UserError("image: is missing; send it as a file")
    if body.sides is not None:
        check(body)
    sides, mask = body.sides or (None, None), files.get("mask")
    return body, await asyncio.to_thread(read_edit_input, files["image"], mask, sides, MAX_UPLOAD_PIXELS)


async def read_instruction_edit(http: Request, family: EditingFamily) -> tuple[EditRequest, tuple[Image.Image, ...]]:
    """The fields and images of a form for a model that edits by instruction.

    Raises:
        UserError: it is no such form, or a field or file is wrong or without effect.
    """
    uploaded, body = await _read_form(http, family.max_images + 1)
    if unknown := {name for name, _ in uploaded} - {"image", "image[]"}:
        raise UserError(f"{min(unknown)}: this model edits by instruction; the files are image, or several image[]")
    if "strength" in body.model_fields_set:
        raise UserError("strength: has no effect on an edit by instruction; leave it out")
    check_count(len(uploaded), family)

    def opened(content: bytes) -> Image.Image:
        image = open_image("image", content, MAX_UPLOAD_PIXELS).convert("RGB")
        family.check_image("image", image)
        return image

    return body, tuple([await asyncio.to_thread(opened, content) for _, content in uploaded])


async def _read_form(http: Request, max_files: int) -> tuple[list[tuple[str, bytes]], EditRequest]:
    """The files of a form by their fields, and its other fields. Raises: UserError for no form, or a wrong field."""
    try:
        form = await http.form(max_files=max_files, max_fields=len(EditRequest.model_fields) + 8)
    except HTTPException as error:
        raise UserError(f"the body is not a valid form: {error.detail}") from None
    try:
        items = form.multi_items()
        files = [(name, await value.read()) for name, value in items if isinstance(value, UploadFile)]
    finally:
        await form.close()
    fields = {name: value for name, value in items if not isinstance(value, UploadFile)}
    if len(files) + len(fields) < len(items):
        raise UserError("a field is there twice; one image and one mask are taken")
    try:
        return files, EditRequest.model_validate(fields)
    except ValidationError as error:
        raise UserError(describe_errors(error.errors())[0]) from None
