// Keeps no log of requests.
migrate((app) => {
  const settings = app.settings();
  settings.logs.maxDays = 0;
  app.save(settings);
});
