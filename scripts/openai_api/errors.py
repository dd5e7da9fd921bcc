"""Errors in the form of OpenAI's API: {"error": {message, type, param, code}} with a status."""

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A fault of a request, or a reason why it cannot be served now; becomes the response."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict:
        """The error as a dict to be sent as JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


async def answer_api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Errors of the routing: no such path, no such method."""
    hint = {
        404: f"there is nothing at {request.url.path}; /docs lists the paths",
        405: f"{request.method} does not work at {request.url.path}",
    }.get(error.status_code, str(error.detail))
    headers = {"Allow": allowed_methods(request)} if error.status_code == 405 else error.headers
    return ApiError(error.status_code, hint, headers=headers).response()


def allowed_methods(request: Request) -> str:
    """The methods of all routes of a path; the routing itself names those of the first alone."""
    found = [
        method
        for method in ("DELETE", "GET", "POST")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    ]
    return ", ".join(found + (["HEAD"] if "GET" in found else []))


async def answer_bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
    """Parameters of the address that do not fit."""
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    return ApiError(400, f"{name}: {fault['msg']}", name, "invalid_value").response()


async def answer_crash(request: Request, error: Exception) -> JSONResponse:
    """A bug of ours: the log gets the traceback, the client an error of the usual shape."""
    return ApiError(500, f"internal error: {type(error).__name__}").response()
