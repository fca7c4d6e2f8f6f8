"""Falcon (WSGI), to be served by granian."""

import falcon
import store


class Users:
    def on_get(self, request, response):
        response.media = store.page(request.get_param_as_int("limit"))

    def on_post(self, request, response):
        item = request.get_media()["item"]
        response.status = falcon.HTTP_201
        response.media = store.add(item["name"], item["mail"])

    def on_get_one(self, request, response, id):
        response.media = store.get(id)


app = falcon.App()
app.add_route("/api/user", Users())
app.add_route("/api/user/{id:int}", Users(), suffix="one")
