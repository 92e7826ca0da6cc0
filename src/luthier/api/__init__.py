"""The OpenAI-compatible server: HTTP in front of one engine (extra `api`).

server.serve(target, ...)    the verb: load, bind, answer until a signal comes
app.create_app(served)       the ASGI application on a loaded model
"""
