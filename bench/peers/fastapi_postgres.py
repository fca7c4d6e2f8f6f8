"""FastAPI with SQLAlchemy's asyncio engine on psycopg, as their documentation shows;
served by uvicorn. A user is three columns: no log of changes, no versions."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    mail: Mapped[str]


class Item(BaseModel):
    name: str
    mail: str


class Envelope(BaseModel):
    item: Item


url = os.environ["DB"].replace("postgresql://", "postgresql+psycopg://")
engine = create_async_engine(url, pool_size=16, max_overflow=0)
make_session = async_sessionmaker(engine, expire_on_commit=False)


async def session() -> AsyncIterator[AsyncSession]:
    async with make_session() as made:
        yield made


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield


app = FastAPI(lifespan=lifespan)


def shown(user: User) -> dict:
    return {"id": user.id, "name": user.name, "mail": user.mail}


@app.get("/api/user/{id}")
async def get_user(id: int, db: AsyncSession = Depends(session)):  # noqa: B008
    user = await db.get(User, id)
    if user is None:
        raise HTTPException(404)
    return {"results": [shown(user)]}


@app.post("/api/user", status_code=201)
async def create_user(envelope: Envelope, db: AsyncSession = Depends(session)):  # noqa: B008
    user = User(**envelope.item.model_dump())
    db.add(user)
    await db.commit()
    return {"code": 0, "message": "SUCCESS", "results": [shown(user)]}
