"""The page of ``cspd serve``, made with gradio (extra ``serve``)."""

from __future__ import annotations

import logging
import threading

from .errors import MissingPackage
from .serve import MAX_BRANCHES, MAX_GUIDANCE, MAX_SEED, MOST_CANDIDATES, Studio, render

WAITING = 16  # requests; who comes when so many wait is told to come again
_logger = logging.getLogger("cspd")
_FONT = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]  # by name: nothing is fetched
_CSS = """
.cspd-made { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 16px; }
.cspd-made.cspd-many { grid-template-columns: 1fr; }
.cspd-made figure { margin: 0; }
.cspd-made figcaption { font-weight: 600; margin-bottom: 6px; }
.cspd-row { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
.cspd-made:not(.cspd-many) .cspd-row { grid-template-columns: 1fr; }
.cspd-made img { width: 100%; border-radius: 6px; display: block; }
.cspd-made img.cspd-pixels { image-rendering: pixelated; }
.cspd-legend { list-style: none; padding: 0; margin: 16px 0 8px; display: flex; flex-wrap: wrap; gap: 6px 22px; }
.cspd-legend li { margin: 0 !important; display: flex; align-items: center; gap: 8px; }
.cspd-legend span { width: 14px; height: 14px; border-radius: 3px; display: inline-block; }
"""


def import_gradio():
    """gradio, or a sentence that says how to get it."""
    try:
        import gradio
    except ImportError as error:
        raise MissingPackage(
            f"cspd serve needs gradio, which cannot be imported ({error}): install the extra `serve`, "
            "`pip install 'cspd-kernels[serve]'`"
        ) from error
    return gradio


def build_page(studio: Studio):
    """The gradio app over a studio: one request at a time, the others wait."""
    gr = import_gradio()
    limits = studio.limits

    def make(*values) -> str:
        try:
            return render(studio.make(*values))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            _logger.exception("a request failed")
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise gr.Error(f"The run failed: {reason}", print_exception=False) from None

    # No telemetry. Pictures are in the page itself: nothing is stored for a request.
    with gr.Blocks(title="cspd", analytics_enabled=False) as app:
        gr.Markdown(
            f"# Continuous speculative decoding\n{studio.name}. A small draft proposes tokens, and the target keeps or "
            "redraws each of them. The target alone draws the same seed for comparison."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                label = gr.Number(3 % studio.classes, label=f"Class, 0 to {studio.classes - 1}", precision=None)
                steps = gr.Slider(1, limits.steps, studio.steps, step=1, label="Steps")
                gamma = gr.Slider(1, limits.gamma, studio.gamma, step=1, label="Gamma: steps of a window")
                guidance = gr.Slider(1, MAX_GUIDANCE, 1, step=0.1, label="Guidance: 1 is none")
                seed = gr.Number(0, label=f"Seed, 0 to {MAX_SEED}", precision=None)
                images = gr.Slider(1, limits.images, 1, step=1, label="Images")
                verify = gr.Radio(
                    [("Window", "window"), ("Strict", "strict")],
                    value="window",
                    label="Verification",
                    info="Strict draws from the target's own distribution"
                    + ("." if studio.one_sigma else ", with one candidate and apart from fallbacks."),
                )
                candidates = gr.Slider(1, MOST_CANDIDATES, 1, step=1, label="Candidates of a token")
                branches = gr.Slider(1, MAX_BRANCHES, 1, step=1, label="Branches: strict only")
                button = gr.Button("Make", variant="primary")
            with gr.Column(scale=3):
                made = gr.HTML("<p>Choose on the left, then press Make.</p>", padding=True)
        inputs = [label, steps, gamma, guidance, seed, images, verify, candidates, branches]
        button.click(make, inputs, made, concurrency_limit=1, api_name="make")
    return app.queue(max_size=WAITING, default_concurrency_limit=1)


def start(app, host: str, port: int) -> str:
    """Serve in threads of their own; returns the address.

    Raises:
        OSError: the port is taken, or the host is no address of this machine.
    """
    gr = import_gradio()
    try:
        _, address, _ = app.launch(
            server_name=host,
            server_port=port,
            theme=gr.themes.Default(font=_FONT, font_mono=["ui-monospace", "monospace"]),
            css=_CSS,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            share=False,
            show_error=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            max_file_size="1kb",  # nobody uploads
        )
    except OSError as error:
        raise OSError(
            f"cannot serve at {host}, port {port}: the port is taken, or the address is not this machine's; "
            "choose others with --host and --port"
        ) from error
    return address


def wait(app) -> None:
    """Until Ctrl-C, which ends the server and lets a run that is being made come to its end."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        app.close(verbose=False)
