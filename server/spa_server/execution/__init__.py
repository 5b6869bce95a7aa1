"""Jobs at work: claimed from the queue, done by processes of their own, published or failed with a reason."""

from spa_server.execution.dispatcher import Dispatcher

__all__ = ["Dispatcher"]
