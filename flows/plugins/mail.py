"""A Prefect notification block for plain SMTP. The server finds it by the entry point `prefect.collections` of this package."""

from __future__ import annotations

import smtplib
import ssl
from email.message import EmailMessage
from typing import Literal

from anyio.to_thread import run_sync
from prefect.blocks.abstract import NotificationBlock, NotificationError
from pydantic import Field, SecretStr, model_validator

from diffusion.trust.redaction import fit_to_leave

SECONDS = 20.0


class SmtpMail(NotificationBlock):
    """Sends notifications as e-mail, through a mail server of your own."""

    _block_type_name = "SMTP Mail"
    _block_type_slug = "smtp-mail"

    host: str = Field(description="The mail server.")
    port: int = Field(default=587, description="Its port: 587 for starttls, 465 for tls, mostly.")
    encryption: Literal["starttls", "tls", "none"] = Field(
        default="starttls",
        description="How the connection is protected. The server's certificate is verified; none: no user, no password.",
    )
    ca_certificate: str | None = Field(
        default=None,
        description="Certificate (PEM) of the authority that vouches for the server, if it is one of your own.",
    )
    user: str | None = Field(default=None, description="User name, if the server asks for one.")
    password: SecretStr | None = Field(default=None, description="Password of the user.")
    sender: str = Field(description="Address that the mail comes from.")
    recipients: list[str] = Field(description="Addresses that it goes to.", min_length=1)

    @model_validator(mode="after")
    def _no_password_in_the_open(self) -> SmtpMail:
        if self.encryption == "none" and (self.user or self.password):
            raise ValueError("user and password would cross the network unencrypted: choose starttls or tls")
        return self

    async def notify(self, body: str, subject: str | None = None) -> None:  # the server awaits it
        """Send a mail. Raises NotificationError if the mail server does not take it."""
        try:
            mail = EmailMessage()
            mail["From"], mail["To"] = self.sender, ", ".join(self.recipients)
            mail["Subject"] = " ".join(fit_to_leave(subject or "train-diffusion").split())
            mail.set_content(fit_to_leave(body))
            await run_sync(self._send, mail)
        except (
            OSError,
            smtplib.SMTPException,
            ValueError,
        ) as error:  # ValueError: addresses and texts that mails can't have
            raise NotificationError(
                f"{self.host}:{self.port} did not take the mail: {fit_to_leave(str(error))}"
            ) from error

    def _send(self, mail: EmailMessage) -> None:
        trusted = ssl.create_default_context(cadata=self.ca_certificate)
        connect = (
            smtplib.SMTP_SSL(self.host, self.port, timeout=SECONDS, context=trusted)
            if self.encryption == "tls"
            else smtplib.SMTP(self.host, self.port, timeout=SECONDS)
        )
        with connect as server:
            if self.encryption == "starttls":
                server.starttls(context=trusted)
            if self.user is not None:
                server.login(self.user, self.password.get_secret_value() if self.password else "")
            server.send_message(mail)
