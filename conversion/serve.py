"""An OpenAI-compatible server of a channel-merged checkpoint: each request is answered by its expert, many at once.

The server is that of Transformers, with its continuous batching: requests of different experts run together in packed
batches. It needs the extra `serve`.

The installed classes run the checkpoint; code files beside the weights are not executed.
"""

import logging
import signal
import socket
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from conversion.io.options import parse_size

logger = logging.getLogger(__name__)


def serve_checkpoint(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    dtype: str = "auto",
    api_key: str | None = None,
    max_tokens: int = 1024,
    max_body: int | str = "1MB",
    cache_tokens: int | None = None,
    grace: int = 30,
) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM; then answers that are begun have `grace` seconds to be finished.

    Args:
        port: 0 takes a free one.
        api_key: what requests must bring; None: nothing.
        max_tokens: the most tokens of an answer.
        max_body: the most bytes of a request.
        cache_tokens: tokens of all running requests together whose keys and values are kept; None: 16,384 on a
            CPU, elsewhere as many as fit.

    Raises:
        ValueError: an option that cannot be, no channel-merged checkpoint that answers chats, the extra is missing.
        OSError: the address cannot be used.
    """
    if not is_serve_available():
        raise ValueError("serving needs more packages: pip install 'channel-merged[serve]'")
    max_body = parse_size(max_body, "max_body")
    if api_key is not None and not (api_key.isascii() and api_key.strip()):
        raise ValueError("the API key is empty or not of ASCII characters")
    with bound_socket(host, port) as listener:  # before gigabytes are loaded
        import uvicorn

        from conversion.serving.answers import ExpertGenerationState
        from conversion.serving.application import build_application
        from conversion.serving.model_manager import MergedModelManager

        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of every request
        manager = MergedModelManager(checkpoint, device, dtype)
        state = ExpertGenerationState(manager.model, cache_tokens)
        try:
            application = build_application(manager, state, max_tokens=max_tokens, max_body=max_body, api_key=api_key)
            config = uvicorn.Config(
                application, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=grace
            )
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
            logger.info("%s answers at %s as %s", manager.name, address, ", ".join(manager.model_names))
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it is done
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            state.shutdown()
    logger.info("the server has stopped")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket on an address that does not listen yet; OSError that names the address where it cannot be used."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return listener
