// PocketBase's collection of users, open to all.
migrate((app) => {
  const open = { listRule: "", viewRule: "", createRule: "" };
  const name = { name: "name", type: "text", required: true };
  const mail = { name: "mail", type: "email", required: true };
  app.save(new Collection({ type: "base", name: "people", ...open, fields: [name, mail] }));
});
