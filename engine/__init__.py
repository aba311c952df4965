"""The inference engine. It knows nothing of Dify, gevent or sockets; see docs/design.md for the life of a request."""
