"""The users below /people of a Flask application, which goes on as it was.

    flask --app mounted_in_flask run

Then http://127.0.0.1:5000/ is Flask's own page, http://127.0.0.1:5000/people the users'
page and http://127.0.0.1:5000/people/api/user their API. Only this host gets in; with
UserAPI(db, open=True) the decision who may pass is left to the code around it.
"""

from __future__ import annotations

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from userapi import Problem, UserAPI


def create_app(db: str = "users.db") -> Flask:
    app = Flask(__name__)
    users = UserAPI(db=db)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/people": users})

    @app.get("/")
    def home() -> str:
        return 'The users are <a href="/people">over there</a>.'

    @app.get("/greet/<int:user_id>")
    def greet(user_id: int) -> tuple[str, int]:
        try:  # the same data without HTTP in between
            return f"Hello, {users.store.get_user(user_id)['name']}!", 200
        except Problem as problem:
            return str(problem), problem.status

    return app
