"""FastAPI, served by uvicorn: with plain `def` routes, as its documentation tells
for a database that blocks, and with `async def`, where each call blocks the loop
for the moment that it takes."""

import store
from fastapi import FastAPI
from pydantic import BaseModel


class Item(BaseModel):
    name: str
    mail: str


class Envelope(BaseModel):
    item: Item


app = FastAPI()


@app.get("/api/user/{id}")
def get_user(id: int):
    return store.get(id)


@app.get("/api/user")
def list_users(limit: int):
    return store.page(limit)


@app.post("/api/user", status_code=201)
def create_user(envelope: Envelope):
    return store.add(envelope.item.name, envelope.item.mail)


async_app = FastAPI()


@async_app.get("/api/user/{id}")
async def get_user_async(id: int):
    return store.get(id)


@async_app.get("/api/user")
async def list_users_async(limit: int):
    return store.page(limit)


@async_app.post("/api/user", status_code=201)
async def create_user_async(envelope: Envelope):
    return store.add(envelope.item.name, envelope.item.mail)
