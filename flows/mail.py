"""A Prefect notification block for plain SMTP. The server finds it by the entry point `prefect.collections` of this package."""

from __future__ import annotations

import smtplib
from email.message import EmailMessage
from typing import Literal

from anyio.to_thread import run_sync
from prefect.blocks.abstract import NotificationBlock, NotificationError
from pydantic import Field, SecretStr

SECONDS = 20.0


class SmtpMail(NotificationBlock):
    """Sends notifications as e-mail, through a mail server of your own."""

    _block_type_name = "SMTP Mail"
    _block_type_slug = "smtp-mail"

    host: str = Field(description="The mail server.")
    port: int = Field(default=587, description="Its port: 587 for starttls, 465 for tls, mostly.")
    encryption: Literal["starttls", "tls", "none"] = Field(
        default="starttls", description="How the connection is protected."
    )
    user: str | None = Field(default=None, description="User name, if the server asks for one.")
    password: SecretStr | None = Field(default=None, description="Password of the user.")
    sender: str = Field(description="Address that the mail comes from.")
    recipients: list[str] = Field(description="Addresses that it goes to.", min_length=1)

    async def notify(self, body: str, subject: str | None = None) -> None:  # the server awaits it
        """Send a mail. Raises NotificationError if the mail server does not take it."""
        mail = EmailMessage()
        mail["From"], mail["To"] = self.sender, ", ".join(self.recipients)
        mail["Subject"] = (subject or "train-diffusion").replace("\n", " ")
        mail.set_content(body)
        try:
            await run_sync(self._send, mail)
        except (OSError, smtplib.SMTPException) as error:
            raise NotificationError(f"{self.host}:{self.port} did not take the mail: {error}") from error

    def _send(self, mail: EmailMessage) -> None:
        connect = smtplib.SMTP_SSL if self.encryption == "tls" else smtplib.SMTP
        with connect(self.host, self.port, timeout=SECONDS) as server:
            if self.encryption == "starttls":
                server.starttls()
            if self.user is not None:
                server.login(self.user, self.password.get_secret_value() if self.password else "")
            server.send_message(mail)
