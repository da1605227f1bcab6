"""The form of ``POST /v1/images/edits``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fewstep.errors import UserError
from fewstep.inference.edit_input import EditInput, read_edit_input
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
    try:
        form = await http.form(max_files=2, max_fields=len(EditRequest.model_fields) + 8)
    except HTTPException as error:
        raise UserError(f"the body is not a valid form: {error.detail}") from None
    try:
        files = {name: value for name, value in form.multi_items() if isinstance(value, UploadFile)}
        fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
        if len(files) + len(fields) < len(form.multi_items()):
            raise UserError("a field is there twice; one image and one mask are taken")
        if unknown := set(files) - {"image", "mask"}:
            raise UserError(f"{min(unknown)}: there is no such file; there are image and mask")
        if "image" not in files:
            raise UserError("image: is missing; send it as a file")
        image = await files["image"].read()
        mask = await files["mask"].read() if "mask" in files else None
    finally:
        await form.close()
    try:
        body = EditRequest.model_validate(fields)
    except ValidationError as error:
        raise UserError(describe_errors(error.errors())[0]) from None
    if body.sides is not None:
        check(body)
    return body, await asyncio.to_thread(read_edit_input, image, mask, body.sides or (None, None), MAX_UPLOAD_PIXELS)
