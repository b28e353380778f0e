"""Draws docs/chat.png: the page of run_chat.py, after two questions and two clicks.

sh exec_run_chat.sh --web=true --temperature=1     (after sh exec_demo.sh; leave it running)
python benchmarks/chat_picture.py                  (needs playwright and Chromium)
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

URL = "http://127.0.0.1:7860"
ANSWERS = (  # questions of the toy world, and whose answer is called better
    ("greet formal full to ada from bob", "PPO"),
    ("thank casual full to eve from ada", "DPO"),
)
PICTURE = Path(__file__).parent.parent / "docs" / "chat.png"


def main() -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 420})
        page.goto(URL)
        for question, better in ANSWERS:
            page.click("button:text-is('New conversation')")
            page.wait_for_function("!document.querySelector('.asked')")
            page.fill("textarea", question)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "document.querySelectorAll('.voice .note').length === 3 &&"
                " [...document.querySelectorAll('.voice .note')].every(x => x.innerText)"
            )
            page.click(f"button:text-is('{better} is better')")
            page.wait_for_function(
                "document.querySelector('.status .prose').innerText.includes('pair')"
            )
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
