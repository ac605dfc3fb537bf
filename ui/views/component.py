"""Views inside Gradio. The only file of this folder that knows it.

Gradio 6 pastes what `{{value}}` gives into a JavaScript template, so that a prompt with `${...}` in it would run, escaped or
not. Here the template is constant: the script below puts HTML that a view made, and escaped, into the page itself.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from hasten.ui.views import theme

_TEMPLATE = '<div class="hv-slot"></div>'
_EVENTS = ("select", "seek", "frame")

_ON_LOAD = """
const show = () => window.hastenViews
  ? hastenViews.replace(element.querySelector(".hv-slot"), typeof props.value === "string" ? props.value : "")
  : console.error("hasten's views have no script: pass **launch_options() to launch().");
element.addEventListener("hasten:select", (event) => trigger('select', event.detail));
watch("value", show);
show();
"""


def shown(html: str = "", **more: Any) -> gr.HTML:
    """A component that shows the HTML of a view; update it with the HTML of another one.

    What the reader chooses arrives at `.select(...)`, as the attributes of its `gr.EventData`: `number` and `recipe` of
    `front`, `id` of `gallery` and `queue`. more: `elem_id`, `visible` and other arguments of `gr.HTML`.
    """
    return gr.HTML(html, html_template=_TEMPLATE, js_on_load=_ON_LOAD, apply_default_css=False, **more)


def launch_options() -> dict[str, Any]:
    """`theme`, `css` and `head` for `launch()`; views neither look right nor move without them."""
    return {"theme": calm(), "css": theme.style_in_gradio(), "head": f"<script>{theme.script()}</script>"}


def calm() -> gr.themes.Base:
    """Gradio's plainest theme with one accent and the system's fonts: nothing is fetched, every text meets WCAG AA."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(font=sans, font_mono=mono, radius_size=gr.themes.sizes.radius_md).set(
        button_primary_background_fill=theme.ACCENT, button_primary_background_fill_dark=theme.ACCENT,
        button_primary_background_fill_hover=theme.ACCENT_HOVER, button_primary_background_fill_hover_dark=theme.ACCENT_HOVER,
        button_primary_text_color=theme.ON_ACCENT, button_primary_text_color_dark=theme.ON_ACCENT,
        button_primary_text_color_hover=theme.ON_ACCENT, button_primary_text_color_hover_dark=theme.ON_ACCENT,
        color_accent=theme.ACCENT, slider_color=theme.ACCENT, slider_color_dark="#4ea8de",
        body_text_color_subdued="#5b6570", body_text_color_subdued_dark="#9aa5b1",
        block_info_text_color="#5b6570", block_info_text_color_dark="#9aa5b1",
        input_placeholder_color="#66707b", input_placeholder_color_dark="#8b95a0",
        body_background_fill="#ffffff", body_background_fill_dark="#14171a",
        block_background_fill="#ffffff", block_background_fill_dark="#14171a",
        background_fill_secondary="#f5f7f9", background_fill_secondary_dark="#1d2226",
        border_color_primary="#d9dee3", border_color_primary_dark="#333b43",
        block_label_text_color="#3c454e", block_label_text_color_dark="#c6cdd4",
        link_text_color=theme.ACCENT, link_text_color_dark="#4ea8de",
    )  # fmt: skip
