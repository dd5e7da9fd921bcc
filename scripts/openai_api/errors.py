"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}} with the fitting status."""

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
         500: "server_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """What is wrong with a request, or why it cannot be served now; becomes the answer to it."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self):
        """The error as a dict to be sent as JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self):
        return JSONResponse(self.body(), self.status, self.headers)


def busy(message):
    """The error for a full queue: come back soon."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def draining():
    """The error while the server is about to end: come back when it has been started again."""
    return ApiError(503, "the server is shutting down: it finishes what runs and takes in nothing new", code="draining",
                    headers={"Retry-After": "5", "Connection": "close"})


async def answer_api_error(request, error):
    return error.response()


async def answer_http_error(request, error: HTTPException):
    """Errors of the routing: no such path, no such method."""
    hint = {404: f"there is nothing at {request.url.path}; /docs lists what is",
            405: f"{request.method} does not work at {request.url.path}"}.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, hint, headers=error.headers).response()


async def answer_crash(request, error):
    """A bug of ours: the log has the traceback, the client an error of the usual shape."""
    return ApiError(500, f"internal error: {type(error).__name__}").response()
