//! HTTPS by rustls, server and client, for the tests: with hyper over tokio-rustls, and with a thread per connection.
//!
//!     serve PORT PEM [http1]                 serve until ended, HTTP/2 and HTTP/1.1 or the latter only
//!     threads PORT PEM                       the same with threads, HTTP/1.1
//!     ask PORT PEM COUNT WORKERS VERSION     so many requests over so many connections, then "COUNT right 0 wrong"
//!     ask-plainly PORT PEM COUNT WORKERS VERSION    the same with a thread per connection
//!
//! `/status/CODE` is answered with that status, `/bytes/COUNT` with so many bytes; a request's body is read and its length
//! told in a header.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{verify_tls12_signature, verify_tls13_signature, WebPkiSupportedAlgorithms};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, version, ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection,
    SignatureScheme, StreamOwned,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn server_config(pem: &str, protocols: &[&str]) -> Result<Arc<ServerConfig>, Failure> {
    let chain = CertificateDer::pem_file_iter(pem)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(pem)?;
    let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

/// Believes one certificate and no other: that of the tests signs itself, which authorities may not for a server.
#[derive(Debug)]
struct Known(CertificateDer<'static>, WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *certificate == self.0 {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General("another certificate".into()))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.1)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.1)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.1.supported_schemes()
    }
}

fn client_config(pem: &str, tls: &str) -> Result<Arc<ClientConfig>, Failure> {
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let known = Known(CertificateDer::from_pem_file(pem)?, algorithms);
    let versions = if tls == "1.2" { [&version::TLS12] } else { [&version::TLS13] };
    let builder = ClientConfig::builder_with_protocol_versions(&versions).dangerous();
    Ok(Arc::new(builder.with_custom_certificate_verifier(Arc::new(known)).with_no_client_auth()))
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let number = |prefix: &str| path.strip_prefix(prefix).and_then(|rest| rest.parse().ok());
    let received = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
    let body = vec![b'x'; number("/bytes/").unwrap_or(5)];
    let mut response = Response::new(Full::new(Bytes::from(body)));
    let status = number("/status/").and_then(|code| StatusCode::from_u16(code as u16).ok());
    *response.status_mut() = status.unwrap_or(StatusCode::OK);
    response.headers_mut().insert("x-received", received.into());
    Ok(response)
}

async fn serve(port: u16, config: Arc<ServerConfig>) -> Result<(), Failure> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let acceptor = TlsAcceptor::from(config);
    loop {
        let (socket, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            if let Ok(stream) = acceptor.accept(socket).await {
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
            }
        });
    }
}

/// Reads up to the end of a head, which must be the end of what there is to read.
fn read_head(stream: &mut impl Read) -> Result<Option<Vec<u8>>, Failure> {
    let (mut head, mut piece) = (Vec::new(), [0; 512]);
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            count => head.extend_from_slice(&piece[..count]),
        }
    }
    Ok(Some(head))
}

fn serve_in_threads(port: u16, config: Arc<ServerConfig>) -> Result<(), Failure> {
    for socket in std::net::TcpListener::bind(("127.0.0.1", port))?.incoming() {
        let (config, socket) = (config.clone(), socket?);
        std::thread::spawn(move || -> Result<(), Failure> {
            let mut stream = StreamOwned::new(ServerConnection::new(config)?, socket);
            while read_head(&mut stream)?.is_some() {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
            }
            Ok(())
        });
    }
    Ok(())
}

/// The requests of one worker: every fourth one has a body.
async fn ask(port: u16, config: Arc<ClientConfig>, numbers: Vec<usize>) -> Result<usize, Failure> {
    let socket = TcpStream::connect(("127.0.0.1", port)).await?;
    let stream = TlsConnector::from(config).connect(ServerName::try_from("localhost")?, socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut right = 0;
    for number in numbers {
        let body = vec![b'y'; if number % 4 == 0 { 50_000 } else { 0 }];
        let method = if body.is_empty() { "GET" } else { "POST" };
        let request = Request::builder().method(method).uri(format!("/status/200?id=first-{number}"));
        let request = request.header("host", format!("localhost:{port}")).body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        right += usize::from(response.status() == StatusCode::OK);
        response.into_body().collect().await?;
    }
    Ok(right)
}

fn ask_plainly(port: u16, config: Arc<ClientConfig>, numbers: Vec<usize>) -> Result<usize, Failure> {
    let socket = std::net::TcpStream::connect(("127.0.0.1", port))?;
    let mut stream = StreamOwned::new(ClientConnection::new(config, ServerName::try_from("localhost")?)?, socket);
    let mut right = 0;
    for number in numbers {
        write!(stream, "GET /status/200?id=first-{number} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n")?;
        right += usize::from(read_head(&mut stream)?.is_some_and(|head| head.starts_with(b"HTTP/1.1 200 ")));
    }
    Ok(right)
}

async fn ask_all(plainly: bool, port: u16, pem: &str, count: usize, workers: usize, tls: &str) -> Result<(), Failure> {
    let config = client_config(pem, tls)?;
    let mut asking = tokio::task::JoinSet::new();
    for worker in 0..workers {
        let (config, numbers) = (config.clone(), (worker..count).step_by(workers).collect());
        if plainly {
            asking.spawn_blocking(move || ask_plainly(port, config, numbers));
        } else {
            asking.spawn(ask(port, config, numbers));
        }
    }
    let mut right = 0;
    while let Some(done) = asking.join_next().await {
        right += done??;
    }
    println!("{right} right {} wrong", count - right);
    Ok(())
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve", port, pem] => serve(port.parse()?, server_config(pem, &["h2", "http/1.1"])?).await,
        ["serve", port, pem, "http1"] => serve(port.parse()?, server_config(pem, &["http/1.1"])?).await,
        ["threads", port, pem] => serve_in_threads(port.parse()?, server_config(pem, &[])?),
        [mode @ ("ask" | "ask-plainly"), port, pem, count, workers, tls] => {
            ask_all(mode == "ask-plainly", port.parse()?, pem, count.parse()?, workers.parse()?, tls).await
        }
        _ => Err("see the head of the source".into()),
    }
}
