"""Bottle on bjoern, a server in C: the limit for a WSGI application."""

import sys

import bjoern
import store
from bottle import Bottle, request, response

app = Bottle()


@app.get("/api/user/<id:int>")
def get_user(id):
    return store.get(id)


@app.get("/api/user")
def list_users():
    return store.page(int(request.query.limit))


@app.post("/api/user")
def create_user():
    response.status = 201
    item = request.json["item"]
    return store.add(item["name"], item["mail"])


if __name__ == "__main__":
    bjoern.run(app, "127.0.0.1", int(sys.argv[1]))
