"""Leave out the launch buttons while the project has no public address: the theme cannot build them without one."""


def drop_launch_buttons(app, config):
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)


def setup(app):
    app.connect("config-inited", drop_launch_buttons)
    return {"parallel_read_safe": True}
