"""Flask, served by its own server and by gunicorn."""

import store
from flask import Flask, request

app = Flask(__name__)


@app.get("/api/user/<int:id>")
def get_user(id):
    return store.get(id)


@app.get("/api/user")
def list_users():
    return store.page(request.args.get("limit", type=int))


@app.post("/api/user")
def create_user():
    item = request.get_json()["item"]
    return store.add(item["name"], item["mail"]), 201
